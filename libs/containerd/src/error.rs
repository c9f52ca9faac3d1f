//! What containerd did not do, and what to make of that.

use std::error::Error as StdError;

use tonic::{Code, Status};

/// What a caller should make of an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// No such blob, container or image.
    NotFound,
    /// The request makes no sense.
    Invalid,
    /// Not now, or not in this state.
    Precondition,
    /// containerd cannot be reached.
    Unavailable,
    /// containerd failed, or we did.
    Internal,
}

/// An error of a call to containerd.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct Error {
    kind: Kind,
    message: String,
    #[source]
    source: Option<Box<dyn StdError + Send + Sync>>,
}

/// The result of a call to containerd.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    pub(crate) fn new(kind: Kind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into(), source: None }
    }

    pub(crate) fn because(mut self, source: impl Into<Box<dyn StdError + Send + Sync>>) -> Self {
        self.source = Some(source.into());
        self
    }

    /// From what a service answered.
    pub fn answer(message: impl Into<String>, status: Status) -> Self {
        let kind = match status.code() {
            Code::NotFound => Kind::NotFound,
            Code::Unavailable => Kind::Unavailable,
            Code::FailedPrecondition => Kind::Precondition,
            _ => Kind::Internal,
        };
        Self::new(kind, message).because(Said(status))
    }

    /// What lies beneath, for an error that takes this one's place.
    #[must_use]
    pub fn into_source(self) -> Option<Box<dyn StdError + Send + Sync>> {
        self.source
    }

    /// What a caller should make of it.
    #[must_use]
    pub fn kind(&self) -> Kind {
        self.kind
    }
}

/// A status as a sentence: its own message, not its code and metadata.
#[derive(Debug, thiserror::Error)]
#[error("{}", .0.message())]
struct Said(Status);
