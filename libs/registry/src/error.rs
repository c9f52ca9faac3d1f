//! What can go wrong between us and a registry.

use std::io;

use oci_client::errors::{OciDistributionError, OciErrorCode};
use ovms_artifact::digest::DigestError;
use ovms_artifact::image::ImageError;
use ovms_artifact::layout::LayoutError;
use reqwest::StatusCode;

/// Why an image cannot be pulled or pushed.
#[derive(Debug, thiserror::Error)]
pub enum RegistryError {
    /// The text is no reference.
    #[error("\"{text}\" is no image reference")]
    Reference {
        /// The text.
        text: String,
        /// Which rule it breaks.
        #[source]
        source: oci_client::ParseError,
    },
    /// The client's runtime.
    #[error("the registry client cannot be started")]
    Setup(#[source] io::Error),
    /// The registry has no such image.
    #[error("the registry has no image {0}")]
    NotFound(String),
    /// The registry wants to know who asks.
    #[error("{0}: the registry wants credentials, and this version of ovm sends none")]
    Unauthorized(String),
    /// A request that failed.
    #[error("{url} cannot be reached")]
    Http {
        /// What was asked for.
        url: String,
        /// What went wrong.
        #[source]
        source: reqwest::Error,
    },
    /// An answer that is none.
    #[error("{url} answers with status {status}")]
    Status {
        /// What was asked for.
        url: String,
        /// The HTTP status.
        status: u16,
    },
    /// A request of the client library.
    #[error("{what}")]
    Client {
        /// What was being done.
        what: String,
        /// What went wrong.
        #[source]
        source: Box<OciDistributionError>,
    },
    /// A manifest or index beyond what is read.
    #[error("{what} has more than the {limit} bytes allowed")]
    TooLarge {
        /// The document.
        what: String,
        /// The limit in bytes.
        limit: u64,
    },
    /// A document that is none.
    #[error("{what} cannot be read")]
    Document {
        /// The document.
        what: String,
        /// What the JSON reader says.
        #[source]
        source: serde_json::Error,
    },
    /// A manifest that is not the one that was asked for.
    #[error("the registry's answer is not what was asked for")]
    Digest(#[source] DigestError),
    /// An index without our platform.
    #[error("image {0} has no manifest for linux/amd64")]
    Platform(String),
    /// The image's documents.
    #[error("the image cannot be used")]
    Image(#[source] ImageError),
    /// The sink or the layout.
    #[error("the image cannot be copied")]
    Layout(#[source] LayoutError),
}

impl From<LayoutError> for RegistryError {
    fn from(error: LayoutError) -> Self {
        Self::Layout(error)
    }
}

impl From<ImageError> for RegistryError {
    fn from(error: ImageError) -> Self {
        Self::Image(error)
    }
}

/// Gives an error of the client library its place.
pub(crate) trait Context<T> {
    fn context(self, what: impl FnOnce() -> String) -> Result<T, RegistryError>;
}

impl<T> Context<T> for Result<T, OciDistributionError> {
    fn context(self, what: impl FnOnce() -> String) -> Result<T, RegistryError> {
        self.map_err(|source| match source {
            OciDistributionError::UnauthorizedError { .. } | OciDistributionError::AuthenticationFailure(_) => {
                RegistryError::Unauthorized(what())
            }
            OciDistributionError::RegistryError { envelope, .. }
                if envelope
                    .errors
                    .iter()
                    .any(|e| matches!(e.code, OciErrorCode::Unauthorized | OciErrorCode::Denied)) =>
            {
                RegistryError::Unauthorized(what())
            }
            OciDistributionError::RequestError(error)
                if matches!(error.status(), Some(StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN)) =>
            {
                RegistryError::Unauthorized(what())
            }
            source => RegistryError::Client { what: what(), source: Box::new(source) },
        })
    }
}
