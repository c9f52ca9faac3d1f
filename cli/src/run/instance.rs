//! The files of one machine of `ovm run`: `<state>/run/<id>/`.
//!
//! ```text
//!  lock          locked as long as the process lives that runs the machine
//!  origin.json   which image it was made from, and where that is
//!  bundle.json, top.data, top.map …   the bundle's record and the disk's writable top
//!  console.log, console.log.1         what a detached machine wrote
//!  ended.json    how a detached machine ended; the directory then stays until `ovm rm`
//! ```
//! A directory whose lock is free and that has no `ended.json` was left by a killed process, and anybody may remove it.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use ovms_artifact::digest::Digest;
use ovms_artifact::oci::Descriptor;
use ovms_bundle::unpack::RECORD;
use ovms_bundle::Record;
use ovms_engine::ExitInfo;
use serde::{Deserialize, Serialize};

use crate::error::CliError;

const LOCK: &str = "lock";
const ORIGIN: &str = "origin.json";
const ENDED: &str = "ended.json";
const CONSOLE: &str = "console.log";
/// Beginning of the name of a directory that is not complete.
const NEW: &str = ".new-";

/// Where a machine's image is.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Origin {
    /// What the user called it.
    pub name: String,
    /// The layout that has it.
    pub layout: PathBuf,
    /// Its manifest.
    pub image: Descriptor,
}

/// A machine that is gone.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Ended {
    /// How it ended.
    pub exit: ExitInfo,
    /// When it was made.
    pub created: SystemTime,
    /// Its vCPUs.
    pub vcpus: u32,
    /// Its memory in bytes.
    pub memory: u64,
}

/// A machine's directory, held by the process that runs the machine.
pub struct Instance {
    /// The directory.
    pub dir: PathBuf,
    _lock: File,
    kept: bool,
}

impl Instance {
    /// Makes the directory of a new machine.
    pub fn make(state: &Path, id: &str, origin: &Origin) -> Result<Self, CliError> {
        let all = all_dir(state);
        fs::DirBuilder::new().recursive(true).mode(0o700).create(&all).map_err(CliError::io)?;
        let made = tempfile::Builder::new().prefix(NEW).tempdir_in(&all).map_err(CliError::io)?;
        let lock = File::create(made.path().join(LOCK)).map_err(CliError::io)?;
        lock.lock().map_err(CliError::io)?;
        let text = serde_json::to_vec(origin).map_err(CliError::invalid)?;
        fs::write(made.path().join(ORIGIN), text).map_err(CliError::io)?;
        let dir = all.join(id);
        for _ in 0..2 {
            match fs::rename(made.path(), &dir) {
                Ok(()) => {
                    let _ = made.keep();
                    return Ok(Self { dir, _lock: lock, kept: false });
                }
                Err(err) if matches!(err.kind(), io::ErrorKind::DirectoryNotEmpty | io::ErrorKind::AlreadyExists) => {
                    if Kept::read(&dir).is_some_and(|kept| kept.ended.is_some()) || !remove_stale(&dir) {
                        break;
                    }
                }
                Err(err) => return Err(CliError::io(err)),
            }
        }
        Err(taken(id))
    }

    /// Where the console of a detached machine goes.
    pub fn console(&self) -> PathBuf {
        self.dir.join(CONSOLE)
    }

    /// Keeps the directory, without the disk's top, for `ovm ps`, `ovm logs` and `ovm rm`.
    pub fn keep(mut self, ended: &Ended) -> Result<(), CliError> {
        let text = serde_json::to_vec(ended).map_err(CliError::invalid)?;
        for entry in fs::read_dir(&self.dir).map_err(CliError::io)?.flatten() {
            let name = entry.file_name();
            let stays = name.to_str().is_some_and(|name| name == LOCK || name == ORIGIN || name.starts_with(CONSOLE));
            if !stays {
                fs::remove_file(entry.path()).map_err(CliError::io)?;
            }
        }
        fs::write(self.dir.join(ENDED), text).map_err(CliError::io)?;
        self.kept = true;
        Ok(())
    }
}

impl Drop for Instance {
    fn drop(&mut self) {
        if self.kept {
            return;
        }
        if let Err(err) = fs::remove_dir_all(&self.dir) {
            eprintln!("ovm: cannot remove {}: {err}", self.dir.display());
        }
    }
}

/// What to do about a name that a machine has already.
pub fn taken(id: &str) -> CliError {
    CliError::exists(format!("there is a machine {id} already: choose another --name, or remove it (ovm rm {id})"))
}

/// A machine's directory as somebody else sees it.
pub struct Kept {
    /// The machine's name.
    pub id: String,
    /// The directory.
    pub dir: PathBuf,
    /// Its image.
    pub origin: Origin,
    /// How it ended, if it has and is kept.
    pub ended: Option<Ended>,
}

impl Kept {
    /// Reads a machine's directory; `None` if there is none, or none that came as far as having an origin.
    fn read(dir: &Path) -> Option<Self> {
        let id = dir.file_name()?.to_str()?.to_owned();
        let origin = serde_json::from_slice(&fs::read(dir.join(ORIGIN)).ok()?).ok()?;
        let ended = fs::read(dir.join(ENDED)).ok().and_then(|text| serde_json::from_slice(&text).ok());
        Some(Self { id, dir: dir.to_owned(), origin, ended })
    }

    /// Every machine's.
    pub fn all(state: &Path) -> Vec<Self> {
        let entries = fs::read_dir(all_dir(state)).into_iter().flatten().flatten();
        let named = entries.filter(|entry| !entry.file_name().to_string_lossy().starts_with(NEW));
        named.filter_map(|entry| Self::read(&entry.path())).collect()
    }

    /// The bundle that it runs from.
    pub fn bundle(&self) -> Option<Record> {
        Record::load(&self.dir.join(RECORD)).ok()
    }

    /// Whether the process that runs the machine lives.
    pub fn is_held(&self) -> bool {
        File::open(self.dir.join(LOCK)).is_ok_and(|lock| lock.try_lock().is_err())
    }

    /// What it wrote, oldest first.
    pub fn console(&self) -> [PathBuf; 2] {
        [self.dir.join(format!("{CONSOLE}.1")), self.dir.join(CONSOLE)]
    }
}

/// Manifests of the images that machines were made from.
pub fn images_in_use(state: &Path) -> Vec<Digest> {
    let running = Kept::all(state).into_iter().filter(|kept| kept.ended.is_none());
    running.filter_map(|kept| crate::images::digest(&kept.origin.image).ok()).collect()
}

/// Removes what killed processes have left.
pub fn sweep(state: &Path) {
    for entry in fs::read_dir(all_dir(state)).into_iter().flatten().flatten() {
        let dir = entry.path();
        if !dir.join(ENDED).exists() {
            remove_stale(&dir);
        }
    }
}

/// Removes a directory if no process holds it.
fn remove_stale(dir: &Path) -> bool {
    let lock = File::open(dir.join(LOCK));
    lock.is_ok_and(|lock| lock.try_lock().is_ok() && fs::remove_dir_all(dir).is_ok())
}

fn all_dir(state: &Path) -> PathBuf {
    state.join("run")
}

#[cfg(test)]
mod tests {
    use super::*;
    use ovms_engine::ExitReason;

    fn origin() -> Origin {
        let image = serde_json::json!({
            "mediaType": "application/vnd.oci.image.manifest.v1+json", "digest": Digest::of(b"x"), "size": 1,
        });
        Origin { name: "debian:13".into(), layout: "/store".into(), image: serde_json::from_value(image).unwrap() }
    }

    #[test]
    fn a_name_is_taken_while_its_process_lives_and_free_after_it_was_killed() {
        let state = tempfile::tempdir().unwrap();
        let first = Instance::make(state.path(), "vm1", &origin()).unwrap();
        let err = Instance::make(state.path(), "vm1", &origin()).map(drop).unwrap_err().chain();
        assert!(err.contains("a machine vm1 already") && err.contains("ovm rm vm1"), "{err}");
        // A killed process drops nothing; only its lock is free.
        let dir = first.dir.clone();
        drop(first);
        fs::create_dir(&dir).unwrap();
        fs::write(dir.join(LOCK), b"").unwrap();
        let _second = Instance::make(state.path(), "vm1", &origin()).unwrap();
        assert_eq!(fs::read_dir(all_dir(state.path())).unwrap().count(), 1);
    }

    #[test]
    fn a_kept_machine_holds_its_name_and_is_not_swept() {
        let state = tempfile::tempdir().unwrap();
        let instance = Instance::make(state.path(), "vm1", &origin()).unwrap();
        fs::write(instance.dir.join("top.data"), b"x").unwrap();
        fs::write(instance.console(), b"hello").unwrap();
        assert_eq!(images_in_use(state.path()), [Digest::of(b"x")]);
        let exit = ExitInfo { status: 0, at: SystemTime::now(), reason: ExitReason::PowerOff, oom_killed: false };
        instance.keep(&Ended { exit, created: SystemTime::now(), vcpus: 1, memory: 1 }).unwrap();

        sweep(state.path());

        let kept = Kept::all(state.path()).pop().unwrap();
        assert_eq!(kept.ended.as_ref().unwrap().exit.status, 0);
        assert!(!kept.dir.join("top.data").exists() && kept.console()[1].exists());
        assert!(Instance::make(state.path(), "vm1", &origin()).is_err());
        assert_eq!(images_in_use(state.path()), []);
    }

    #[test]
    fn sweep_removes_what_killed_processes_left() {
        let state = tempfile::tempdir().unwrap();
        let living = Instance::make(state.path(), "vm1", &origin()).unwrap();
        for name in ["vm2", ".new-abc"] {
            let dir = all_dir(state.path()).join(name);
            fs::create_dir(&dir).unwrap();
            fs::write(dir.join(LOCK), b"").unwrap();
        }
        sweep(state.path());
        assert_eq!(fs::read_dir(all_dir(state.path())).unwrap().count(), 1);
        assert!(living.dir.exists());
    }
}
