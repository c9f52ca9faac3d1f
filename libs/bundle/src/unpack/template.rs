//! Templates: what a start from a prepared cache reads instead of an image, and the instances that are made of them.

use std::{
    fs::{self, File, FileTimes},
    io,
    path::{Path, PathBuf},
    time::SystemTime,
};

use ovms_artifact::digest::Digest;

use super::{Cache, RECORD};
use crate::{open::make_top, Error, Record, Result, TopPaths};

impl Cache {
    /// The template of the image with this manifest, if every file that it names is still there. The image is not looked
    /// at: what is in the cache was verified when it was put there.
    #[must_use]
    pub fn template(&self, image: &Digest) -> Option<Record> {
        let path = self.template_path(image);
        let record = Record::load(&path).ok()?;
        let ram = record.ram.as_ref();
        let lacks_ram = record.manifest.ram_snapshot.is_some() && ram.is_none() && self.options.max_ram.is_some();
        let optional = ram.map(|ram| &ram.working_set);
        let there = |path: &PathBuf| Some(path) == optional || fs::symlink_metadata(path).is_ok();
        if lacks_ram || !record.paths().iter().all(there) {
            return None;
        }
        // The time of its last use. A cache on a read-only file system forgets it, which does no harm.
        let now = FileTimes::new().set_modified(SystemTime::now());
        let _ = File::open(&path).and_then(|file| file.set_times(now));
        Some(record)
    }

    /// Forgets an image; [`Cache::prune`] removes what it alone has needed.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn forget(&self, image: &Digest) -> Result<()> {
        let path = self.template_path(image);
        match fs::remove_file(&path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(Error::io("remove", path)(e)),
            _ => Ok(()),
        }
    }

    pub(super) fn keep_template(&self, image: &Digest, record: &Record) -> Result<()> {
        record.save(&self.template_path(image))
    }

    fn template_path(&self, image: &Digest) -> PathBuf {
        self.root.join("images").join(format!("{}.json", image.hex()))
    }
}

/// Makes an instance of a template in `dir`, which must exist and hold none yet: a fresh top and the record, whose
/// path is returned. Nothing is synced: an instance lives no longer than the host is up.
///
/// # Errors
/// [`Error::Io`], [`Error::Disk`].
pub fn instantiate(template: &Record, dir: &Path) -> Result<PathBuf> {
    let mut record = template.clone();
    if let Some(disk) = &mut record.disk {
        let top = TopPaths { data: dir.join("top.data"), map: dir.join("top.map") };
        make_top(&top, disk.virtual_size)?;
        disk.top = Some(TopPaths { data: "top.data".into(), map: "top.map".into() });
    }
    let path = dir.join(RECORD);
    fs::write(&path, record.text(&path)?).map_err(Error::io("write", &path))?;
    Ok(path)
}
