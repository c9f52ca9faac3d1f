//! Checkpoint: the whole machine, memory and all, goes into a directory from which it can go on later.
//!
//! containerd's client has stopped the vCPUs before and lets them go on afterwards; a machine that runs is saved as
//! well. Where the client named no directory, containerd packs its own into an archive as soon as this returns, and
//! removes it when the client has gone: then nobody wants the rest.

use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use containerd_shim_protos::events::task::TaskCheckpointed;
use tracing::{info, warn};

use super::container::Status;
use super::{blocking, Tasks};
use crate::error::{Error, Kind, Result};
use crate::events::Event;
use crate::instance::{Instance, Press, Save};

/// What is asked of a checkpoint.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Request {
    /// Directory to fill. It is made if it is not there.
    pub dir: PathBuf,
    /// End the machine once it is saved.
    pub exit: bool,
}

impl Tasks {
    /// Saves a running or paused container into a directory.
    ///
    /// # Errors
    /// [`Kind::NotFound`]; [`Kind::Precondition`] if it was never started; [`Kind::Invalid`] for a directory that is not
    /// empty; what the machine says. The container then is as it was, and so is the directory.
    pub async fn checkpoint(&self, id: &str, request: Request) -> Result<()> {
        let container = self.get(id)?;
        let _turn = container.turn.lock().await;
        container.alive()?;
        if container.status() == Status::Created {
            return Err(Error::new(Kind::Precondition, format!("container {id} was not started, so it has no memory")));
        }
        let (instance, asked) = (container.instance.clone(), request.clone());
        blocking(move || save(&*instance, &asked)).await?;
        info!(id, dir = %request.dir.display(), "the machine was saved");
        self.events.publish(Event::Checkpointed(TaskCheckpointed {
            container_id: id.to_owned(),
            checkpoint: request.dir.to_string_lossy().into_owned(),
            ..Default::default()
        }));
        if request.exit {
            container.set_status(Status::Paused);
            let instance = container.instance.clone();
            blocking(move || instance.press(Press::Kill)).await?;
        }
        Ok(())
    }
}

fn save(instance: &dyn Instance, request: &Request) -> Result<()> {
    let dir = &request.dir;
    let made = make(dir)?;
    let inode = inode(dir).map_err(|e| Error::caused(format!("cannot use the directory {}", dir.display()), e))?;
    // Another directory of that name is none that was asked for.
    let wanted = || self::inode(dir).is_ok_and(|now| now == inode);
    let saved = instance.save(dir, Save { stop: request.exit }, &wanted);
    if saved.is_err() && made {
        if let Err(error) = fs::remove_dir(dir) {
            warn!(dir = %dir.display(), %error, "cannot remove the directory of a checkpoint that failed");
        }
    }
    saved
}

/// Makes the directory and says whether it did; one that is there must be empty.
fn make(dir: &Path) -> Result<bool> {
    if !dir.is_absolute() {
        let message = format!("the directory {dir:?} of the checkpoint is not an absolute path");
        return Err(Error::new(Kind::Invalid, message));
    }
    match fs::create_dir(dir) {
        Ok(()) => return Ok(true),
        Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
        Err(error) => return Err(Error::caused(format!("cannot make the directory {}", dir.display()), error)),
    }
    let mut entries =
        fs::read_dir(dir).map_err(|e| Error::caused(format!("cannot read the directory {}", dir.display()), e))?;
    if entries.next().is_some() {
        let message = format!("the directory {} of the checkpoint is not empty: name another", dir.display());
        return Err(Error::new(Kind::Invalid, message));
    }
    Ok(false)
}

fn inode(dir: &Path) -> std::io::Result<(u64, u64)> {
    fs::metadata(dir).map(|metadata| (metadata.dev(), metadata.ino()))
}
