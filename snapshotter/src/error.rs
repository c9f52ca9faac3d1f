//! One error for the whole daemon: a kind that containerd's clients understand, a sentence, and what lies beneath.
//! [`Error::chain`] prints it once; `From<Error> for tonic::Status` and [`Error::refusal`] are the only places where a
//! kind becomes a code.

use std::error::Error as StdError;

use ovms_proto::bundle::RefusalKind;
use tonic::{Code, Status};

/// What a client should make of an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// No such snapshot, blob, container or image.
    NotFound,
    /// The key or name is taken.
    AlreadyExists,
    /// The request or the image makes no sense.
    Invalid,
    /// Not now, or not in this state.
    Precondition,
    /// Another differ should do it.
    Unimplemented,
    /// containerd cannot be reached.
    Unavailable,
    /// The daemon failed.
    Internal,
}

/// An error of the daemon.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct Error {
    kind: Kind,
    message: String,
    #[source]
    source: Option<Box<dyn StdError + Send + Sync>>,
}

/// The daemon's result.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// An error of `kind`; the message is one lower-case sentence.
    pub fn new(kind: Kind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into(), source: None }
    }

    /// [`Kind::NotFound`].
    pub fn not_found(message: impl Into<String>) -> Self {
        Self::new(Kind::NotFound, message)
    }

    /// [`Kind::Invalid`].
    pub fn invalid(message: impl Into<String>) -> Self {
        Self::new(Kind::Invalid, message)
    }

    /// [`Kind::Precondition`].
    pub fn precondition(message: impl Into<String>) -> Self {
        Self::new(Kind::Precondition, message)
    }

    /// [`Kind::Internal`].
    pub fn internal(message: impl Into<String>) -> Self {
        Self::new(Kind::Internal, message)
    }

    /// Adds what lies beneath.
    pub fn because(mut self, source: impl Into<Box<dyn StdError + Send + Sync>>) -> Self {
        self.source = Some(source.into());
        self
    }

    /// What a client should make of it.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// The whole chain in one line, `a: b: c`.
    pub fn chain(&self) -> String {
        ovms_proto::chain(self)
    }

    /// The kind as the bundle service says it.
    pub fn refusal(&self) -> RefusalKind {
        match self.kind {
            Kind::NotFound => RefusalKind::NotFound,
            Kind::Invalid | Kind::AlreadyExists => RefusalKind::Invalid,
            Kind::Precondition | Kind::Unavailable => RefusalKind::Precondition,
            Kind::Unimplemented | Kind::Internal => RefusalKind::Internal,
        }
    }
}

impl From<ovms_containerd::Error> for Error {
    fn from(error: ovms_containerd::Error) -> Self {
        use ovms_containerd::Kind as Theirs;
        let kind = match error.kind() {
            Theirs::NotFound => Kind::NotFound,
            Theirs::Invalid => Kind::Invalid,
            Theirs::Precondition => Kind::Precondition,
            Theirs::Unavailable => Kind::Unavailable,
            Theirs::Internal => Kind::Internal,
        };
        Self { kind, message: error.to_string(), source: error.into_source() }
    }
}

impl From<Error> for Status {
    fn from(error: Error) -> Self {
        let code = match error.kind {
            Kind::NotFound => Code::NotFound,
            Kind::AlreadyExists => Code::AlreadyExists,
            Kind::Invalid => Code::InvalidArgument,
            Kind::Precondition => Code::FailedPrecondition,
            Kind::Unimplemented => Code::Unimplemented,
            Kind::Unavailable => Code::Unavailable,
            Kind::Internal => Code::Internal,
        };
        Status::new(code, error.chain())
    }
}

/// Adds a sentence to whatever failed.
pub trait Context<T> {
    /// The failure becomes [`Kind::Internal`] with this sentence.
    fn context<M: Into<String>>(self, message: impl FnOnce() -> M) -> Result<T>;
    /// The failure becomes `kind` with this sentence.
    fn context_kind<M: Into<String>>(self, kind: Kind, message: impl FnOnce() -> M) -> Result<T>;
}

impl<T, E: Into<Box<dyn StdError + Send + Sync>>> Context<T> for std::result::Result<T, E> {
    fn context<M: Into<String>>(self, message: impl FnOnce() -> M) -> Result<T> {
        self.context_kind(Kind::Internal, message)
    }

    fn context_kind<M: Into<String>>(self, kind: Kind, message: impl FnOnce() -> M) -> Result<T> {
        self.map_err(|source| Error::new(kind, message()).because(source))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_chain_is_printed_once_in_order() {
        let beneath = Error::internal("the file is gone").because(std::io::Error::other("no such file"));
        let error = Error::not_found("snapshot a cannot be read").because(beneath);
        assert_eq!(error.chain(), "snapshot a cannot be read: the file is gone: no such file");
        let status = Status::from(error);
        assert_eq!(
            (status.code(), status.message()),
            (Code::NotFound, "snapshot a cannot be read: the file is gone: no such file")
        );
    }
}
