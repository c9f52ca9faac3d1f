//! What `start` notes in the bundle for `delete`: which machine is meant, since a later container may have the same id
//! and the same path, and where machines are noted on this host, since the settings may not be readable any more.

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// File in the bundle.
const FILE: &str = "ovms-machine.json";
/// Random bytes that no two starts share.
const RANDOM: usize = 16;

/// The note.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Note {
    /// Name of this one among all machines that ever have the container's id.
    pub instance: String,
    /// The engine's runtime directory.
    pub runtime: PathBuf,
}

impl Note {
    /// Writes a new one into `bundle`.
    pub(super) fn write(bundle: &Path, runtime: &Path) -> Result<()> {
        let mut random = [0; RANDOM];
        let failed = |e: io::Error| Error::caused(format!("cannot write the file {FILE} in the bundle"), e);
        File::open("/dev/urandom").and_then(|mut file| file.read_exact(&mut random)).map_err(failed)?;
        let note = Self { instance: hex::encode(random), runtime: runtime.to_owned() };
        let unfinished = bundle.join(format!(".{FILE}"));
        serde_json::to_vec(&note)
            .map_err(io::Error::from)
            .and_then(|bytes| fs::write(&unfinished, bytes))
            .and_then(|()| fs::rename(&unfinished, bundle.join(FILE)))
            .map_err(failed)
    }

    /// Reads that of a bundle; none if the bundle is gone or an older version began it.
    pub fn read(bundle: &Path) -> Option<Self> {
        serde_json::from_slice(&fs::read(bundle.join(FILE)).ok()?).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_two_notes_name_one_machine() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(Note::read(dir.path()), None);
        let notes = [(); 2].map(|()| {
            Note::write(dir.path(), Path::new("/run/ovms")).unwrap();
            Note::read(dir.path()).unwrap()
        });
        assert_ne!(notes[0].instance, notes[1].instance);
        assert_eq!(notes[1].runtime, Path::new("/run/ovms"));
    }
}
