//! Commit of a machine's snapshot: a look at what lies in its directory, nothing that takes time, since containerd
//! holds a transaction of its own open meanwhile.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use ovms_artifact::media;

use super::tops::Tops;
use crate::daemon::Daemon;
use crate::error::{Context, Error, Result};
use crate::store::{Content, Layer, Record};

/// Decides what a snapshot that is being committed holds. Says whether work is left for [`super::finish`].
pub fn at_commit(daemon: &Daemon, record: &mut Record, below: Option<&Record>) -> Result<()> {
    let dir = daemon.layout.snapshot(record.number);
    match record.content {
        Content::Files if below.is_none() && holds_machine(&dir.join("fs"))? == Found::Machine => {
            record.content = Content::Machine(Layer::Unpacked);
        }
        Content::Machine(Layer::Empty | Layer::Ready) if tops_are_there(&dir)? => {
            record.content = Content::Machine(Layer::Unpacked);
        }
        Content::Machine(Layer::Empty) => {
            let found = holds_machine(&dir.join("fs"))?;
            if found == Found::Machine {
                record.content = Content::Machine(Layer::Unpacked);
            } else if found == Found::Nothing {
                record.content = Content::Machine(Layer::Ready);
            } else {
                return Err(Error::invalid(
                    "a layer of an ordinary image lies above the disk layers of a machine: a machine's image holds \
                     disk layers and descriptors only",
                ));
            }
        }
        Content::Files | Content::Machine(_) => {}
    }
    Ok(())
}

#[derive(Debug, PartialEq, Eq)]
enum Found {
    Nothing,
    /// What the tar of a machine's layer holds, and nothing else.
    Machine,
    Other,
}

/// Looks at the names in a directory that another differ filled. Nothing in it is opened.
fn holds_machine(fs: &Path) -> Result<Found> {
    let names = |dir: &Path| -> std::io::Result<BTreeSet<String>> {
        // One more than a machine's layer can hold is enough to know that it is none.
        fs::read_dir(dir)?.take(4).map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned())).collect()
    };
    let failed = || format!("cannot look into {}", fs.display());
    let top = names(fs).context(failed)?;
    if top.is_empty() {
        return Ok(Found::Nothing);
    }
    let ovm = fs.join(media::MEMBER_DIR);
    if top.iter().ne([media::MEMBER_DIR]) || !fs::symlink_metadata(&ovm).context(failed)?.is_dir() {
        return Ok(Found::Other);
    }
    let members = [media::MEMBER_MANIFEST, media::MEMBER_QCOW2, media::MEMBER_RAW];
    let found = names(&ovm).context(failed)?;
    let ours = |name: &String| {
        let path = ovm.join(name);
        members.iter().any(|member| fs.join(member) == path) && fs::symlink_metadata(&path).is_ok_and(|m| m.is_file())
    };
    Ok(if !found.is_empty() && found.iter().all(ours) { Found::Machine } else { Found::Other })
}

/// Whether a container ran on this snapshot; its tops become the layer, so no machine may hold them.
fn tops_are_there(dir: &Path) -> Result<bool> {
    let Some(tops) = Tops::find(dir)? else { return Ok(false) };
    tops.check_unused()?;
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn look(files: &[&str]) -> Found {
        let dir = tempfile::tempdir().unwrap();
        for file in files {
            let path = dir.path().join(file);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, "").unwrap();
        }
        holds_machine(dir.path()).unwrap()
    }

    #[test]
    fn a_machine_is_told_by_its_names() {
        assert_eq!(look(&[]), Found::Nothing);
        assert_eq!(look(&["ovm/disk.qcow2"]), Found::Machine);
        assert_eq!(look(&["ovm/disk.raw", "ovm/manifest.json"]), Found::Machine);
        assert_eq!(look(&["ovm/disk.raw", "bin/sh"]), Found::Other);
        assert_eq!(look(&["ovm/other"]), Found::Other);
        assert_eq!(look(&["ovm"]), Found::Other);
        assert_eq!(look(&["bin/sh", "etc/passwd"]), Found::Other);
    }

    #[test]
    fn links_are_no_machine() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("ovm")).unwrap();
        std::os::unix::fs::symlink("/etc/shadow", dir.path().join("ovm/disk.raw")).unwrap();
        assert_eq!(holds_machine(dir.path()).unwrap(), Found::Other);
    }
}
