//! Whether a machine resumes from RAM or boots, decided at each Resolve. RAM fits one state of the disk only, that of the
//! instant at which both were taken:
//!
//! ```text
//!  disk of the container's snapshot      image with RAM        checkpoint given       neither
//!  untouched since it was made           resumes               resumes                boots
//!  written by a machine                  boots                 refused                boots
//! ```

use std::fs;
use std::path::Path;
use std::sync::Arc;

use ovms_artifact::manifest::Manifest;
use ovms_bundle::{Ram, Record};

use super::checkpoint::{Checkpoint, Mark, MARK};
use super::ram::{self, locked::Place, Wanted};
use super::tops::{self, Seen};
use super::unpack::Tell;
use crate::daemon::Daemon;
use crate::error::{Context, Error, Result};
use crate::store::Chain;
use ovms_containerd::Scope;

/// What a machine that is being made resumes from.
pub async fn first(
    daemon: &Arc<Daemon>,
    scope: &Scope,
    chain: &Chain,
    manifest: &Manifest,
    checkpoint: Option<&Checkpoint>,
    tell: Tell<'_>,
) -> Result<Option<Ram>> {
    let wanted = match checkpoint {
        Some(checkpoint) => Some(checkpoint.wanted(manifest)),
        None => Wanted::of(manifest)?,
    };
    match wanted.filter(|_| ram::is_allowed(daemon)) {
        Some(wanted) => ready(daemon, scope, chain, wanted, checkpoint, tell).await.map(Some),
        None => Ok(None),
    }
}

/// Makes RAM ready, held by the container's snapshot, and by the image's if it comes from there.
async fn ready(
    daemon: &Arc<Daemon>,
    scope: &Scope,
    chain: &Chain,
    wanted: Wanted,
    checkpoint: Option<&Checkpoint>,
    tell: Tell<'_>,
) -> Result<Ram> {
    let image = chain.parents.first().filter(|_| checkpoint.is_none()).map(|parent| parent.number);
    let holders: Vec<_> = std::iter::once(chain.record.number).chain(image).collect();
    let blob = checkpoint.map(Checkpoint::ram);
    ram::ready(daemon, scope, wanted, blob.as_deref(), &holders, tell).await
}

/// Brings the record of a machine that was made before in line with its disk.
pub async fn add_ram(
    daemon: &Arc<Daemon>,
    scope: &Scope,
    chain: &Chain,
    bundle: &Path,
    checkpoint: Option<&Checkpoint>,
    tell: Tell<'_>,
) -> Result<()> {
    let (number, dir) = (chain.record.number, daemon.layout.snapshot(chain.record.number));
    let path = bundle.to_owned();
    let (record, mark, seen) = daemon.blocking(move |_| look(&path, &dir)).await?;
    if checkpoint.is_some() && (seen != Seen::Untouched || mark.as_ref() != checkpoint.map(Checkpoint::mark)) {
        return Err(Error::precondition(
            "the container's disk is not that of the checkpoint any more: restore it into a new container",
        ));
    }
    let wanted = match (checkpoint, &mark) {
        (Some(checkpoint), _) => Some(checkpoint.wanted(&record.manifest)),
        // Its disk is that of a checkpoint, not that of the image's RAM.
        (None, Some(_)) => None,
        (None, None) => Wanted::of(&record.manifest)?,
    };
    let start = match (seen, wanted) {
        // Whoever holds the disk started as its record said then; the next one to start is refused by the lock.
        (Seen::InUse, _) => return Ok(()),
        (Seen::Written, wanted) => {
            if wanted.is_some() {
                tell("the disk was written since its RAM was taken, so the machine boots".into());
            }
            Start::Boot
        }
        (Seen::Untouched, None) => Start::Boot,
        // The engine says so to whoever starts it.
        (Seen::Untouched, Some(_)) if !ram::is_allowed(daemon) => Start::Denied,
        (Seen::Untouched, Some(wanted)) => Start::Resume(ready(daemon, scope, chain, wanted, checkpoint, tell).await?),
    };
    if !start.changes(&record) {
        return Ok(());
    }
    let path = bundle.to_owned();
    daemon.blocking(move |daemon| change(daemon, &path, number, start)).await
}

/// How a machine starts.
#[derive(Debug)]
enum Start {
    /// It boots, now and later: a record that says nothing of RAM.
    Boot,
    /// The operator does not let it resume, so its RAM is not unpacked; the record still says that the image has some.
    Denied,
    /// It resumes.
    Resume(Ram),
}

impl Start {
    /// Whether a record must be written anew for this start.
    fn changes(&self, record: &Record) -> bool {
        match self {
            Self::Boot => record.ram.is_some() || record.manifest.ram_snapshot.is_some(),
            Self::Denied => record.ram.is_some(),
            Self::Resume(ram) => record.ram.as_ref() != Some(ram),
        }
    }
}

fn look(bundle: &Path, dir: &Path) -> Result<(Record, Option<Mark>, Seen)> {
    let record = Record::load(bundle).context(|| "the machine's record cannot be read")?;
    let path = dir.join(MARK);
    let mark = match fs::read(&path) {
        Err(err) if err.kind() == std::io::ErrorKind::NotFound => None,
        read => {
            let text = read.context(|| format!("cannot read {}", path.display()))?;
            Some(serde_json::from_slice(&text).context(|| format!("{} is damaged", path.display()))?)
        }
    };
    let mut found = Seen::InUse;
    tops::look(&record, dir, |seen| {
        found = seen;
        Ok(())
    })?;
    Ok((record, mark, found))
}

/// Writes the record anew, unless a machine has taken the disk meanwhile.
fn change(daemon: &Daemon, bundle: &Path, number: u64, start: Start) -> Result<()> {
    let failed = || "the machine's record cannot be changed";
    let dir = daemon.layout.snapshot(number);
    let mut record = Record::load(bundle).context(failed)?;
    let before = record.ram.take();
    tops::look(&record.clone(), &dir, |seen| {
        if seen == Seen::InUse || (seen == Seen::Written && matches!(start, Start::Resume(_))) {
            return Err(Error::precondition("a machine has taken the disk meanwhile: try again"));
        }
        match start {
            Start::Boot => record.manifest.ram_snapshot = None,
            Start::Denied => {}
            Start::Resume(ram) => record.ram = Some(ram),
        }
        record.save(bundle).context(failed)
    })?;
    let needs = |ram: &Ram| [ram::key_of(&ram.digest), Place::of(daemon, ram).key()];
    let now = record.ram.as_ref().map(needs).into_iter().flatten().collect::<Vec<_>>();
    let before = before.as_ref().map(needs).into_iter().flatten();
    let gone = before.filter(|key| !now.contains(key)).collect::<Vec<_>>();
    if !gone.is_empty() {
        daemon.store.let_go(&gone, number)?;
        daemon.unlock()?;
    }
    Ok(())
}
