//! Applies the tar of an ordinary layer to a snapshot's directory, as containerd's own differ does.
//!
//! The archive is somebody else's and this process is root, so no path of it is ever given to the kernel as it is:
//! names are reduced to plain components, and folders are opened by `openat2` with the snapshot's directory as the root
//! of the walk ([`tree`]), so neither `..` nor a symbolic link that an earlier member made leads out. Extension records
//! that the archive makes long cost at most [`MAX_RECORDS`].
//!
//! Above a parent the directory is an overlay's upper one, so a whiteout becomes what overlay takes for one: a character
//! device 0:0, or an attribute on a folder that hides what lies below it. Without a parent there is nothing to hide.

mod entry;
mod tree;

use std::cell::Cell;
use std::io::{self, Read};
use std::path::PathBuf;
use std::rc::Rc;

use thiserror::Error;

use tree::{Name, Tree};

/// Most bytes of headers and extension records before one member.
const MAX_RECORDS: u64 = 4 << 20;
/// Most folders of one layer: each is remembered until the end, when its times are set.
const MAX_FOLDERS: usize = 1 << 20;
/// A whiteout's name begins with this.
const WHITEOUT: &[u8] = b".wh.";
/// Names that begin with this are not whiteouts of a file.
const WHITEOUT_META: &[u8] = b".wh..wh.";
/// Hides everything below the folder that it lies in.
const OPAQUE: &[u8] = b".wh..wh..opq";

/// Why a layer cannot be applied.
#[derive(Debug, Error)]
pub enum UntarError {
    /// The archive is damaged, or the blob cannot be read.
    #[error("the layer's archive cannot be read")]
    Archive(#[source] io::Error),
    /// The directory is not what it should be.
    #[error("the snapshot's directory cannot be opened")]
    Directory(#[source] io::Error),
    /// One member.
    #[error("member {name:?} of the layer cannot be made")]
    Member {
        /// Its name in the archive.
        name: String,
        /// What the system says.
        #[source]
        source: io::Error,
    },
    /// One member that is never made.
    #[error("member {name:?} of the layer is refused: {why}")]
    Refused {
        /// Its name in the archive.
        name: String,
        /// The rule.
        why: &'static str,
    },
    /// A bound.
    #[error("the layer has more than {MAX_FOLDERS} folders")]
    Folders,
}

/// Where a layer goes.
#[derive(Clone, Debug)]
pub struct Target {
    /// The directory.
    pub dir: PathBuf,
    /// Directories of the layers below, nearest first: a folder that the archive leaves out takes its mode and owner
    /// from there.
    pub below: Vec<PathBuf>,
    /// Name of overlay's attribute for an opaque folder.
    pub opaque_attribute: &'static str,
}

/// Applies a decompressed layer. What follows the archive's end is left in the reader.
pub fn apply(reader: &mut dyn Read, target: &Target) -> Result<(), UntarError> {
    let budget = Rc::new(Cell::new(u64::MAX));
    let mut archive = tar::Archive::new(Budget { inner: reader, left: Rc::clone(&budget) });
    let tree = Tree::open(target).map_err(UntarError::Directory)?;
    let mut folders = Vec::new();
    let mut entries = archive.entries().map_err(UntarError::Archive)?;
    loop {
        budget.set(MAX_RECORDS);
        let Some(entry) = entries.next() else { break };
        let mut entry = entry.map_err(UntarError::Archive)?;
        budget.set(u64::MAX);
        let shown = String::from_utf8_lossy(&entry.path_bytes()).chars().take(200).collect::<String>();
        let name = Name::of(&entry.path_bytes());
        let step = one(&tree, target, &mut entry, &name, &mut folders);
        step.map_err(|step| match step {
            Step::Io(source) => UntarError::Member { name: shown, source },
            Step::Refused(why) => UntarError::Refused { name: shown, why },
            Step::Folders => UntarError::Folders,
        })?;
        io::copy(&mut entry, &mut io::sink()).map_err(UntarError::Archive)?;
    }
    for (name, times) in folders.iter().rev() {
        // A later member may have replaced the folder by something else.
        if let Some(folder) = tree.find(name).map_err(UntarError::Directory)? {
            entry::set_times(&folder, c".", times).map_err(UntarError::Directory)?;
        }
    }
    Ok(())
}

/// Why one member failed.
enum Step {
    Io(io::Error),
    Refused(&'static str),
    Folders,
}

impl From<io::Error> for Step {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

impl From<rustix::io::Errno> for Step {
    fn from(error: rustix::io::Errno) -> Self {
        Self::Io(error.into())
    }
}

fn one<R: Read>(
    tree: &Tree<'_>,
    target: &Target,
    entry: &mut tar::Entry<'_, R>,
    name: &Name,
    folders: &mut Vec<(Name, rustix::fs::Timestamps)>,
) -> Result<(), Step> {
    let kind = entry.header().entry_type();
    if kind.is_pax_global_extensions() {
        return Ok(());
    }
    // The root itself, which the snapshot has: containerd leaves it as it is.
    let Some((folder, base)) = name.split() else { return Ok(()) };
    let parent = tree.make(&folder)?;
    if let Some(hidden) = base.as_bytes().strip_prefix(WHITEOUT) {
        if target.below.is_empty() {
            return Ok(());
        }
        if base.as_bytes() == OPAQUE {
            return Ok(parent.set_attribute(c".", target.opaque_attribute, b"y")?);
        }
        if base.as_bytes().starts_with(WHITEOUT_META) {
            return Ok(());
        }
        let hidden = tree::base(hidden).ok_or(Step::Refused("its name is no whiteout's"))?;
        return Ok(parent.white_out(&hidden)?);
    }
    let attributes = entry::Attributes::of(entry)?;
    let is_folder = kind.is_dir();
    let hidden_below = parent.clear(&base, is_folder)?;
    entry::make(tree, &parent, &base, entry)?;
    if is_folder && hidden_below {
        parent.set_attribute(&base, target.opaque_attribute, b"y")?;
    }
    if !kind.is_hard_link() {
        attributes.set(&parent, &base, kind.is_symlink())?;
    }
    if is_folder {
        if folders.len() == MAX_FOLDERS {
            return Err(Step::Folders);
        }
        folders.push((name.clone(), attributes.times));
    }
    Ok(())
}

/// A reader that fails once a budget is used up.
struct Budget<'a> {
    inner: &'a mut dyn Read,
    left: Rc<Cell<u64>>,
}

impl Read for Budget<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let read = self.inner.read(buf)?;
        match self.left.get().checked_sub(read as u64) {
            Some(left) => self.left.set(left),
            None => return Err(io::Error::other("the records before a member are too long")),
        }
        Ok(read)
    }
}

#[cfg(test)]
mod tests;
