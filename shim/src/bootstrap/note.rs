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
    /// Writes it into `bundle`. A second start there is one of the same container.
    pub(super) fn write(bundle: &Path, runtime: &Path) -> Result<()> {
        let failed = |e: io::Error| Error::caused(format!("cannot write the file {FILE} in the bundle"), e);
        let instance = match Self::read(bundle) {
            Some(note) => note.instance,
            None => random().map_err(failed)?,
        };
        let note = Self { instance, runtime: runtime.to_owned() };
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

fn random() -> io::Result<String> {
    let mut bytes = [0; RANDOM];
    File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(hex::encode(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_bundle_names_a_machine_of_its_own_whenever_it_is_written() {
        let bundles = [(); 2].map(|()| tempfile::tempdir().unwrap());
        assert_eq!(Note::read(bundles[0].path()), None);
        let write = |bundle: &tempfile::TempDir, runtime: &str| {
            Note::write(bundle.path(), Path::new(runtime)).unwrap();
            Note::read(bundle.path()).unwrap()
        };
        let [first, second] = bundles.each_ref().map(|bundle| write(bundle, "/run/ovms"));
        assert_ne!(first.instance, second.instance);
        let again = write(&bundles[0], "/run/other");
        assert_eq!(again, Note { runtime: "/run/other".into(), ..first });
    }
}
