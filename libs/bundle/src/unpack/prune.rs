//! Taking from the cache what was not used for longest.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    time::SystemTime,
};

use super::Cache;
use crate::{Error, Record, Result};

/// What an image's template names, each below the cache's root: `layers/<name>`, `tables/<name>`, …
const PARTS: [&str; 4] = ["layers", "tables", "blobs", "ram"];

/// A template and when it was last used.
struct Image {
    path: PathBuf,
    used: SystemTime,
    parts: BTreeSet<PathBuf>,
}

impl Cache {
    /// Removes images, those first that were not used for longest, until what is left takes at most `cap` bytes of disk, and
    /// with them every part that neither an image that is left nor one of `instances` names. Returns the bytes that were
    /// freed; `None` if the cache is being used at this moment, so that nothing could be removed.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn prune(&self, cap: u64, instances: &[Record]) -> Result<Option<u64>> {
        let (path, lock) = self.lock_file()?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(fs::TryLockError::WouldBlock) => return Ok(None),
            Err(fs::TryLockError::Error(e)) => return Err(Error::io("lock", path)(e)),
        }
        let sizes = self.sizes()?;
        let mut images = self.images()?;
        images.sort_by_key(|image| std::cmp::Reverse(image.used));
        let mut needed: BTreeSet<PathBuf> = instances.iter().flat_map(|record| self.parts(record)).collect();
        let size_of = |parts: &BTreeSet<PathBuf>| -> u64 { parts.iter().filter_map(|part| sizes.get(part)).sum() };
        let mut full = false;
        for image in images {
            let with: BTreeSet<PathBuf> = needed.union(&image.parts).cloned().collect();
            full = full || size_of(&with) > cap;
            if full {
                fs::remove_file(&image.path).map_err(Error::io("remove", &image.path))?;
            } else {
                needed = with;
            }
        }
        let mut freed = 0_u64;
        for (part, size) in sizes.iter().filter(|(part, _)| !needed.contains(*part)) {
            let path = self.root.join(part);
            let remove = if path.is_dir() { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
            remove.map_err(Error::io("remove", path))?;
            freed = freed.saturating_add(*size);
        }
        Ok(Some(freed))
    }

    fn images(&self) -> Result<Vec<Image>> {
        let dir = self.root.join("images");
        let mut images = Vec::new();
        for entry in fs::read_dir(&dir).map_err(Error::io("read", &dir))?.flatten() {
            let path = entry.path();
            let used = entry.metadata().and_then(|meta| meta.modified()).map_err(Error::io("read", &path))?;
            // One that cannot be read is of no use to anybody.
            let parts = Record::load(&path).map(|record| self.parts(&record)).unwrap_or_default();
            images.push(Image { path, used, parts });
        }
        Ok(images)
    }

    /// The parts of the cache that a record names.
    fn parts(&self, record: &Record) -> BTreeSet<PathBuf> {
        let paths = record.paths();
        let inside = paths.iter().filter_map(|path| path.strip_prefix(&self.root).ok());
        inside.map(|path| path.iter().take(2).collect()).collect()
    }

    /// Bytes of disk that each part takes. What a maker of RAM is at work on has a name of its own and is left alone.
    fn sizes(&self) -> Result<BTreeMap<PathBuf, u64>> {
        let mut sizes = BTreeMap::new();
        for kind in PARTS {
            let dir = self.root.join(kind);
            for entry in fs::read_dir(&dir).map_err(Error::io("read", &dir))?.flatten() {
                let name = entry.file_name();
                if !name.to_string_lossy().starts_with('.') {
                    sizes.insert(Path::new(kind).join(name), disk_use(&entry.path()).unwrap_or_default());
                }
            }
        }
        Ok(sizes)
    }
}

fn disk_use(path: &Path) -> io::Result<u64> {
    let meta = fs::symlink_metadata(path)?;
    // 512: the unit of st_blocks, see stat(2).
    let mut sum = meta.blocks().saturating_mul(512);
    if meta.is_dir() {
        for entry in fs::read_dir(path)? {
            sum = sum.saturating_add(disk_use(&entry?.path())?);
        }
    }
    Ok(sum)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{unpack::Options, worker::Launcher, Manifest, RECORD_VERSION};
    use ovms_artifact::digest::Digest;
    use std::{fs::FileTimes, time::Duration};

    const MIB: u64 = 1 << 20;

    struct Bench {
        _dir: tempfile::TempDir,
        cache: Cache,
    }

    impl Bench {
        fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            let options =
                Options { launcher: Launcher::new(), limits: Default::default(), max_boot_file: 1, max_ram: None };
            let cache = Cache::open(&dir.path().join("cache"), options).unwrap();
            Self { _dir: dir, cache }
        }

        /// An image of one kernel of 1 MiB, last used that many hours ago.
        fn image(&self, name: &str, kernel: &str, hours: u64) -> (Digest, Record) {
            let kernel = self.cache.root.join("blobs").join(kernel);
            fs::write(&kernel, vec![1; MIB as usize]).unwrap();
            let record = Record {
                version: RECORD_VERSION,
                image: None,
                manifest: Manifest::new("t/image", "1"),
                kernel: Some(kernel),
                initrd: None,
                disk: None,
                ram: None,
            };
            let digest = Digest::of(name.as_bytes());
            self.cache.keep_template(&digest, &record).unwrap();
            let path = self.cache.root.join("images").join(format!("{}.json", digest.hex()));
            let then = SystemTime::now() - Duration::from_secs(3600 * hours);
            fs::File::open(path).unwrap().set_times(FileTimes::new().set_modified(then)).unwrap();
            (digest, record)
        }
    }

    #[test]
    fn prune_takes_what_was_not_used_for_longest() {
        let bench = Bench::new();
        let (old, _) = bench.image("old", "a", 3);
        let (middle, _) = bench.image("middle", "b", 2);
        let (new, _) = bench.image("new", "c", 1);
        assert!(bench.cache.template(&old).is_some(), "this was a use of it");

        let freed = bench.cache.prune(2 * MIB + MIB / 2, &[]).unwrap();

        assert_eq!(freed, Some(MIB));
        let left = [&old, &middle, &new].map(|image| bench.cache.template(image).is_some());
        assert_eq!(left, [true, false, true]);
    }

    #[test]
    fn prune_keeps_what_instances_and_other_images_share() {
        let bench = Bench::new();
        let (_, running) = bench.image("running", "a", 3);
        bench.image("one", "b", 2);
        let (two, _) = bench.image("two", "b", 1);

        bench.cache.prune(2 * MIB + MIB / 2, std::slice::from_ref(&running)).unwrap();

        assert!(bench.cache.template(&two).is_some() && running.kernel.as_ref().unwrap().exists());
        assert_eq!(bench.cache.prune(0, std::slice::from_ref(&running)).unwrap(), Some(MIB));
        assert!(bench.cache.template(&two).is_none() && running.kernel.unwrap().exists());
    }

    #[test]
    fn prune_of_a_cache_in_use_leaves_everything() {
        let bench = Bench::new();
        let (image, _) = bench.image("one", "a", 1);
        let held = bench.cache.hold().unwrap();
        assert_eq!(bench.cache.prune(0, &[]).unwrap(), None);
        drop(held);
        assert_eq!(bench.cache.prune(0, &[]).unwrap(), Some(MIB));
        assert!(bench.cache.template(&image).is_none());
    }

    #[test]
    fn template_whose_file_is_gone_is_none() {
        let bench = Bench::new();
        let (image, record) = bench.image("one", "a", 1);
        fs::remove_file(record.kernel.unwrap()).unwrap();
        assert_eq!(bench.cache.template(&image), None);
    }
}
