//! The descriptors that came beside the configuration, taken out by the index that names them.

use std::fs::File;
use std::os::fd::OwnedFd;

use ovms_config::vm::FdIndex;
use thiserror::Error;

/// A descriptor that cannot be had.
#[derive(Debug, Error, PartialEq, Eq)]
#[error("descriptor {0} is named twice or is not there")]
pub struct FdError(FdIndex);

/// Descriptors by index, each to be taken once.
#[derive(Debug, Default)]
pub struct Fds(Vec<Option<OwnedFd>>);

impl Fds {
    /// Takes over what was received.
    pub fn new(fds: Vec<OwnedFd>) -> Self {
        Self(fds.into_iter().map(Some).collect())
    }

    /// Takes descriptor `index`.
    ///
    /// # Errors
    /// [`FdError`] if it is taken already.
    pub fn take(&mut self, index: FdIndex) -> Result<OwnedFd, FdError> {
        self.0.get_mut(index as usize).and_then(Option::take).ok_or(FdError(index))
    }

    /// As [`Fds::take`], as a file.
    ///
    /// # Errors
    /// [`FdError`].
    pub fn take_file(&mut self, index: FdIndex) -> Result<File, FdError> {
        self.take(index).map(File::from)
    }

    /// As [`Fds::take`], for an index that may be missing.
    ///
    /// # Errors
    /// [`FdError`].
    pub fn take_optional(&mut self, index: Option<FdIndex>) -> Result<Option<OwnedFd>, FdError> {
        index.map(|index| self.take(index)).transpose()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn take_twice_returns_an_error() {
        let mut fds = Fds::new(vec![File::open("/dev/null").unwrap().into()]);
        assert!(fds.take(0).is_ok());
        assert_eq!(fds.take(0).unwrap_err(), FdError(0));
        assert_eq!(fds.take(1).unwrap_err(), FdError(1));
        assert!(fds.take_optional(None).unwrap().is_none());
    }
}
