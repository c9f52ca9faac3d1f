//! The one error of this crate: a sentence, a kind that clients can act on, and what caused it.

use std::error::Error as StdError;

pub use ovms_proto::chain;
use thiserror::Error;

/// What a client should make of an error; `status.rs` maps it to ttrpc codes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// No such container or process, or it has ended.
    NotFound,
    /// A container of that name is there already.
    AlreadyExists,
    /// The request, the spec or the image asks for what cannot be.
    Invalid,
    /// Not in the state that the container is in.
    Precondition,
    /// Something that virtual machines without an agent do not do.
    Unimplemented,
    /// A service that is needed does not answer.
    Unavailable,
    /// A fault of ovms or of the host.
    Internal,
}

/// An error and its kind. The text is one sentence without the cause; [`Error::chain`] gives both.
#[derive(Debug, Error)]
#[error("{message}")]
pub struct Error {
    kind: Kind,
    message: String,
    #[source]
    source: Option<Box<dyn StdError + Send + Sync>>,
}

/// Result with [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// An error without a cause.
    pub fn new(kind: Kind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into(), source: None }
    }

    /// An error of kind [`Kind::Internal`] that was caused by `source`.
    pub fn caused(message: impl Into<String>, source: impl StdError + Send + Sync + 'static) -> Self {
        Self { kind: Kind::Internal, message: message.into(), source: Some(Box::new(source)) }
    }

    /// The same error as another kind.
    pub fn of_kind(mut self, kind: Kind) -> Self {
        self.kind = kind;
        self
    }

    /// What a client should make of it.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// The sentence and its causes, outermost first, joined by `: `.
    pub fn chain(&self) -> String {
        chain(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io;

    #[test]
    fn chain_tells_each_cause_once() {
        let error = Error::caused("cannot open the log", io::Error::other("no such device"));
        assert_eq!(error.chain(), "cannot open the log: no such device");
        assert_eq!(error.kind(), Kind::Internal);
    }
}
