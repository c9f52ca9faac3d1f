//! What can go wrong with a machine: one sentence, a kind, and the source where there is one.
//!
//! Callers map [`Kind`] to ttrpc codes (shim) or exit codes (CLI) in one small file each; the chain of sources is
//! printed once, at the top.

use std::error::Error as StdError;
use std::io;

/// What a caller should make of an [`Error`]; the kinds are those that containerd's clients know.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// No such machine, file or device.
    NotFound,
    /// A machine of that name is there already.
    AlreadyExists,
    /// The request cannot be fulfilled as it is, whatever the state of the host.
    InvalidArgument,
    /// The machine or something it needs is not in the state for it (disk in use, machine not running, ...).
    FailedPrecondition,
    /// The host does not offer what is needed now (no /dev/kvm, no ovms-vmm, no answer in time).
    Unavailable,
    /// A fault of ovms or of the host.
    Internal,
}

/// An error of the engine.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct Error {
    kind: Kind,
    message: String,
    incompatible: bool,
    #[source]
    source: Option<Box<dyn StdError + Send + Sync>>,
}

/// A result of the engine.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// An error without a source. `message` is one lower-case sentence.
    pub(crate) fn new(kind: Kind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into(), incompatible: false, source: None }
    }

    /// Adds what caused it.
    pub(crate) fn because(mut self, source: impl Into<Box<dyn StdError + Send + Sync>>) -> Self {
        self.source = Some(source.into());
        self
    }

    /// An [`Kind::Internal`] error with an I/O error as its source: for use in `map_err`.
    pub(crate) fn io(message: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let message = message.into();
        move |source| Self::new(Kind::Internal, message).because(source)
    }

    /// Says that this host cannot resume the machine's RAM.
    pub(crate) fn incompatible(mut self) -> Self {
        self.incompatible = true;
        self
    }

    /// Whether this host cannot resume the machine's RAM; the same image may still boot.
    #[must_use]
    pub fn is_incompatible(&self) -> bool {
        self.incompatible
    }

    /// What a caller should make of it.
    #[must_use]
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// The whole chain in one line, outermost first, joined by `: `.
    #[must_use]
    pub fn chain(&self) -> String {
        ovms_proto::chain(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_chain_is_one_line_and_says_each_thing_once() {
        let err = Error::io("cannot open the kernel /k")(io::Error::from_raw_os_error(2));
        assert_eq!(err.kind(), Kind::Internal);
        assert_eq!(err.to_string(), "cannot open the kernel /k");
        assert_eq!(err.chain(), "cannot open the kernel /k: No such file or directory (os error 2)");
    }
}
