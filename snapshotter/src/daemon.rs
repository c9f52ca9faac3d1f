//! What the three services share: the directory tree, the store, the way to containerd, and the settings.

use std::path::Path;
use std::sync::Arc;

use ovms_config::Settings;

use crate::error::{Context, Error, Result};
use crate::keyed::Keyed;
use crate::layout::{self, Layout};
use crate::machine::ram::{self, locked::LockedFiles, preload::Preloads};
use crate::mounts::OverlayOptions;
use crate::progress::Conversions;
use crate::store::{Chain, Content, Kind, NewSnapshot, Record, Store, Usage};
use crate::usage;
use ovms_containerd::Containerd;

/// The daemon.
#[derive(Debug)]
pub struct Daemon {
    /// Its directory tree.
    pub layout: Layout,
    /// Its records.
    pub store: Store,
    /// How ordinary snapshots are mounted here.
    pub overlay: OverlayOptions,
    /// containerd's API.
    pub containerd: Containerd,
    /// The operator's settings.
    pub settings: Settings,
    /// Work that must not happen twice at once.
    pub keyed: Keyed,
    /// How far conversions are.
    pub progress: Conversions,
    /// RAM on tmpfs.
    pub preloads: Preloads,
    /// RAM that is locked in memory.
    pub locked: LockedFiles,
}

impl Daemon {
    /// Opens the root directory and brings it in line with the store.
    pub fn open(root: &Path, settings: Settings) -> Result<Arc<Self>> {
        let layout = Layout::open(root)?;
        let store = Store::open(&layout.store())?;
        let containerd = Containerd::new(&settings.paths.containerd_socket)?;
        let preloads = Preloads::open(&settings.paths.runtime, layout.root())?;
        let daemon = Self {
            layout,
            store,
            overlay: OverlayOptions::probe(),
            containerd,
            settings,
            keyed: Keyed::default(),
            progress: Conversions::default(),
            preloads,
            locked: LockedFiles::default(),
        };
        daemon.cleanup()?;
        Ok(Arc::new(daemon))
    }

    /// Runs blocking work on a thread that may block.
    pub async fn blocking<T: Send + 'static>(
        self: &Arc<Self>,
        work: impl FnOnce(&Daemon) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let daemon = Arc::clone(self);
        match tokio::task::spawn_blocking(move || work(&daemon)).await {
            Ok(result) => result,
            Err(failed) => Err(Error::internal("a worker thread of the snapshotter failed").because(failed)),
        }
    }

    /// Makes an active snapshot or a view.
    pub fn create(&self, new: &NewSnapshot) -> Result<Chain> {
        let chain = self.store.create(new, |chain| {
            let owner = match mapped_root(&chain.record)? {
                Some(owner) => Some(owner),
                None => chain.parents.first().map(|parent| self.owner(parent.number)).transpose()?,
            };
            let work = chain.record.kind == Kind::Active && chain.record.content == Content::Files;
            self.layout.make_snapshot(chain.record.number, work, owner)
        })?;
        tracing::debug!(key = new.key, number = chain.record.number, kind = ?new.kind, parent = new.parent, "snapshot made");
        Ok(chain)
    }

    fn owner(&self, number: u64) -> Result<(u32, u32)> {
        let fs = self.layout.fs(number);
        let found = rustix::fs::stat(&fs).context(|| format!("cannot look at {}", fs.display()))?;
        Ok((found.st_uid, found.st_gid))
    }

    /// Forgets a snapshot and returns the directory that holds what is left of it.
    pub fn remove(&self, key: &str) -> Result<std::path::PathBuf> {
        let record = self.store.remove(key)?;
        tracing::debug!(key, number = record.number, "snapshot removed");
        self.unlock()?;
        self.layout.detach_snapshot(record.number)
    }

    /// Unlocks RAM that no container needs locked any more.
    pub fn unlock(&self) -> Result<()> {
        self.locked.release(|| self.store.held())
    }

    /// Removes directories, blobs and RAM that the store does not know, and nothing else.
    pub fn cleanup(&self) -> Result<()> {
        let mut gone = Vec::new();
        self.store.with_known(|known, needed| {
            for name in names(&self.layout.snapshots())? {
                match name.parse::<u64>() {
                    Ok(number) if !known(number) => gone.push(self.layout.detach_snapshot(number)?),
                    Ok(_) => {}
                    Err(_) => tracing::warn!(name, "a foreign file lies among the snapshots; it stays"),
                }
            }
            for name in names(&self.layout.blobs())? {
                if !needed(&format!("sha256:{name}")) {
                    gone.push(self.layout.detach(&self.layout.blobs().join(&name), &format!("blob-{name}"))?);
                }
            }
            for name in names(&self.layout.ram())? {
                if !name.starts_with('.') && !needed(&ram::key(&name)) {
                    gone.push(self.layout.detach(&self.layout.ram().join(&name), &format!("ram-{name}"))?);
                }
            }
            gone.extend(self.preloads.detach(|hex| needed(&ram::key(hex)))?);
            Ok(())
        })?;
        self.unlock()?;
        for path in gone {
            layout::remove(&path).context(|| format!("cannot remove {}", path.display()))?;
            tracing::info!(path = %path.display(), "removed what no snapshot needs");
        }
        Ok(())
    }

    /// Makes everything in a snapshot's file system durable.
    pub fn sync_snapshot(&self, number: u64) -> Result<()> {
        let dir = self.layout.snapshot(number);
        let sync = || -> std::io::Result<()> { Ok(rustix::fs::syncfs(std::fs::File::open(&dir)?)?) };
        sync().context(|| format!("cannot sync snapshot {number}"))
    }

    /// Disk space of a snapshot; that of a committed one is counted once.
    pub fn usage(&self, key: &str) -> Result<Usage> {
        let record = self.store.get(key)?;
        if let Some(usage) = record.usage {
            return Ok(usage);
        }
        let path = match record.content {
            Content::Files => self.layout.fs(record.number),
            Content::Machine(_) => self.layout.snapshot(record.number),
        };
        let usage = usage::of(&path).context(|| format!("cannot count the space of snapshot {key}"))?;
        if record.kind == Kind::Committed {
            self.store.amend(record.number, |record| {
                if record.kind == Kind::Committed {
                    record.usage = Some(usage);
                }
            })?;
        }
        Ok(usage)
    }
}

/// The names in a directory.
pub fn names(dir: &Path) -> Result<Vec<String>> {
    let failed = || format!("cannot list {}", dir.display());
    let entries = std::fs::read_dir(dir).context(failed)?;
    entries.map(|entry| Ok(entry.context(failed)?.file_name().to_string_lossy().into_owned())).collect()
}

/// Host ids of a user namespace's root, from the labels that containerd's clients set with `--uidmap` and `--gidmap`.
fn mapped_root(record: &Record) -> Result<Option<(u32, u32)>> {
    let id = |label: &str| -> Result<Option<u32>> {
        let Some(text) = record.labels.get(label) else { return Ok(None) };
        let wrong = || Error::invalid(format!("label {label} is no list of container:host:count with id 0: {text:?}"));
        for entry in text.split(',') {
            let numbers: Vec<u32> = entry.split(':').map(str::parse).collect::<Result<_, _>>().map_err(|_| wrong())?;
            match numbers.as_slice() {
                [0, host, count] if *count > 0 => return Ok(Some(*host)),
                [_, _, _] => {}
                _ => return Err(wrong()),
            }
        }
        Err(wrong())
    };
    let uid = id("containerd.io/snapshot/uidmapping")?;
    let gid = id("containerd.io/snapshot/gidmapping")?;
    match (uid, gid) {
        (None, None) => Ok(None),
        (Some(uid), Some(gid)) => Ok(Some((uid, gid))),
        _ => Err(Error::invalid("labels containerd.io/snapshot/uidmapping and gidmapping come together")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;
    use std::fs;

    fn daemon(root: &Path) -> Arc<Daemon> {
        Daemon::open(root, Settings::default()).unwrap()
    }

    fn active(key: &str) -> NewSnapshot {
        NewSnapshot { kind: Kind::Active, key: key.into(), parent: String::new(), labels: BTreeMap::new() }
    }

    #[tokio::test]
    async fn a_start_removes_what_the_store_does_not_know_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let kept = daemon(dir.path()).create(&active("kept")).unwrap().record.number;
        // A crash between the rename of a directory and the commit of its record, and one in the middle of a removal.
        fs::create_dir_all(dir.path().join("s/77/fs")).unwrap();
        fs::create_dir_all(dir.path().join("tmp/gone-5/fs")).unwrap();
        fs::write(dir.path().join("blobs/aa"), "left").unwrap();
        fs::write(dir.path().join("s/README"), "an operator's").unwrap();

        let daemon = daemon(dir.path());

        assert_eq!(names(&daemon.layout.snapshots()).unwrap().len(), 2);
        assert!(daemon.layout.fs(kept).is_dir() && dir.path().join("s/README").exists());
        assert!(names(&daemon.layout.tmp()).unwrap().is_empty() && names(&daemon.layout.blobs()).unwrap().is_empty());
    }

    #[tokio::test]
    async fn remove_frees_the_key_and_the_directory() {
        let dir = tempfile::tempdir().unwrap();
        let daemon = daemon(dir.path());
        let number = daemon.create(&active("x")).unwrap().record.number;
        layout::remove(&daemon.remove("x").unwrap()).unwrap();
        assert!(!daemon.layout.snapshot(number).exists());
        assert_ne!(daemon.create(&active("x")).unwrap().record.number, number);
    }

    #[tokio::test]
    async fn usage_of_a_committed_snapshot_is_counted_once() {
        let dir = tempfile::tempdir().unwrap();
        let daemon = daemon(dir.path());
        let number = daemon.create(&active("x")).unwrap().record.number;
        fs::write(daemon.layout.fs(number).join("file"), vec![1; 100_000]).unwrap();
        daemon.store.commit("x", "base", "", BTreeMap::new(), |_, _| Ok(())).unwrap();
        let first = daemon.usage("base").unwrap();
        assert!(first.bytes >= 100_000 && first.inodes == 2);
        fs::write(daemon.layout.fs(number).join("other"), "").unwrap();
        assert_eq!(daemon.usage("base").unwrap(), first);
    }

    #[test]
    fn mapped_root_reads_the_entry_of_id_0() {
        let mut record = Store::open(&tempfile::tempdir().unwrap().path().join("db"))
            .unwrap()
            .create(&active("x"), |_| Ok(()))
            .unwrap()
            .record;
        assert_eq!(mapped_root(&record).unwrap(), None);
        record.labels.insert("containerd.io/snapshot/uidmapping".into(), "5:7:1,0:1000:65536".into());
        assert!(mapped_root(&record).is_err());
        record.labels.insert("containerd.io/snapshot/gidmapping".into(), "0:2000:65536".into());
        assert_eq!(mapped_root(&record).unwrap(), Some((1000, 2000)));
        record.labels.insert("containerd.io/snapshot/gidmapping".into(), "1:2000:65536".into());
        assert!(mapped_root(&record).is_err());
    }
}
