//! The contract between a part of a machine and whoever keeps its state.

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use thiserror::Error;

/// The most bytes that one section's payload may hold. The largest part, a virtio device with all its queues, needs
/// a few KiB; guest memory is never a section.
pub const MAX_SECTION_BYTES: usize = 1 << 20;
/// The most bytes that the payloads of all sections of a machine may hold together: a VMM keeps them in its memory beside
/// the guest's, under one limit. The largest machine, 32 processors of 20 KiB and 16 disks among 20 devices of up to 40 KiB,
/// needs less than 2 MiB.
pub const MAX_SECTIONS_BYTES: usize = 8 << 20;

/// What can go wrong with saved state.
#[derive(Debug, Error)]
pub enum StateError {
    /// The section is of another part.
    #[error("expected a section of kind {expected}, found {found}")]
    WrongKind {
        /// The kind the part saves.
        expected: &'static str,
        /// The kind found in the section.
        found: String,
    },
    /// The part does not know this version of its own section.
    #[error("section {kind} has version {found}, this build reads up to {newest}")]
    UnknownVersion {
        /// The section's kind.
        kind: &'static str,
        /// The version found.
        found: u32,
        /// The newest version that this build reads.
        newest: u32,
    },
    /// The payload is longer than [`MAX_SECTION_BYTES`].
    #[error("section {kind} holds {bytes} bytes, more than {MAX_SECTION_BYTES}")]
    TooLong {
        /// The section's kind.
        kind: String,
        /// The payload's length in bytes.
        bytes: usize,
    },
    /// The payload cannot be encoded or decoded.
    #[error("section {kind} cannot be read")]
    Payload {
        /// The section's kind.
        kind: &'static str,
        /// What the decoder says.
        #[source]
        source: serde_json::Error,
    },
    /// The payload decodes, but says something that no machine could have saved.
    #[error("section {kind} is not a state this part can be in: {what}")]
    Invalid {
        /// The section's kind.
        kind: &'static str,
        /// Which field, what it holds and what it may hold.
        what: String,
    },
}

/// One part's saved state.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Section {
    /// Which part this is, for instance `serial` or `virtio-blk/0`; unique within a machine.
    pub kind: String,
    /// The payload's format, counted from 1.
    pub version: u32,
    /// The encoded state, at most [`MAX_SECTION_BYTES`] bytes.
    pub payload: Vec<u8>,
}

impl Section {
    /// Encodes `state` as the payload of a section.
    ///
    /// # Errors
    /// [`StateError::Payload`] if the state cannot be encoded, [`StateError::TooLong`] if it is too large.
    pub fn encode<T: Serialize>(kind: &'static str, version: u32, state: &T) -> Result<Self, StateError> {
        let payload = serde_json::to_vec(state).map_err(|source| StateError::Payload { kind, source })?;
        if payload.len() > MAX_SECTION_BYTES {
            return Err(StateError::TooLong { kind: kind.into(), bytes: payload.len() });
        }
        Ok(Self { kind: kind.into(), version, payload })
    }

    /// Decodes the payload after checking kind and version. The result is still hostile: its fields are the
    /// sender's words.
    ///
    /// # Errors
    /// Every variant of [`StateError`] but `Invalid`.
    pub fn decode<T: DeserializeOwned>(&self, kind: &'static str, newest: u32) -> Result<T, StateError> {
        if self.kind != kind {
            return Err(StateError::WrongKind { expected: kind, found: self.kind.clone() });
        }
        if self.version == 0 || self.version > newest {
            return Err(StateError::UnknownVersion { kind, found: self.version, newest });
        }
        if self.payload.len() > MAX_SECTION_BYTES {
            return Err(StateError::TooLong { kind: self.kind.clone(), bytes: self.payload.len() });
        }
        serde_json::from_slice(&self.payload).map_err(|source| StateError::Payload { kind, source })
    }
}

/// A part of a machine that can be saved and restored.
///
/// `restore` is called on a part that was built from the same configuration, before any vCPU runs; it validates the
/// whole section before it changes anything. Saving, restoring and saving again gives the same section.
pub trait Persist {
    /// Saves the part. The machine is paused and no I/O is in flight.
    ///
    /// # Errors
    /// [`StateError`] if the state cannot be encoded.
    fn save(&self) -> Result<Section, StateError>;

    /// Takes over a saved state. Parts are shared with buses and threads when they are restored, so they lock
    /// inside.
    ///
    /// # Errors
    /// [`StateError`] if the section is not a state that this part can be in; the part is then unchanged.
    fn restore(&self, section: &Section) -> Result<(), StateError>;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn decode_of_encoded_state_gives_the_state() {
        let section = Section::encode("clock", 1, &(7u32, true)).unwrap();
        assert_eq!(section.decode::<(u32, bool)>("clock", 1).unwrap(), (7, true));
    }

    #[test]
    fn decode_other_kind_returns_wrong_kind() {
        let section = Section::encode("clock", 1, &1u8).unwrap();
        let err = section.decode::<u8>("serial", 1).unwrap_err();
        assert_eq!(err.to_string(), "expected a section of kind serial, found clock");
    }

    #[test]
    fn decode_newer_version_returns_unknown_version() {
        let section = Section { kind: "clock".into(), version: 3, payload: b"1".to_vec() };
        assert!(matches!(
            section.decode::<u8>("clock", 2),
            Err(StateError::UnknownVersion { found: 3, newest: 2, .. })
        ));
    }

    #[test]
    fn decode_long_payload_returns_too_long() {
        let section = Section { kind: "clock".into(), version: 1, payload: vec![b'1'; MAX_SECTION_BYTES + 1] };
        assert!(matches!(section.decode::<u64>("clock", 1), Err(StateError::TooLong { .. })));
    }
}
