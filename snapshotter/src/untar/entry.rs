//! One member of a layer's archive: what it is made as, and what it looks like.

use std::ffi::CStr;
use std::fs::File;
use std::io::{self, Read};

use rustix::fs::{self as sys, AtFlags, FileType, Mode, OFlags, Timespec, Timestamps};
use rustix::io::Errno;

use super::tree::{Folder, Name, Tree};
use super::Step;

/// Key of an extended attribute in a pax record.
const PAX_ATTRIBUTE: &str = "SCHILY.xattr.";

/// Owner, mode, times and extended attributes of a member.
pub struct Attributes {
    uid: u32,
    gid: u32,
    mode: Mode,
    /// Last access and last modification.
    pub times: Timestamps,
    extended: Vec<(String, Vec<u8>)>,
}

impl Attributes {
    /// Reads them from a member's header and records.
    pub fn of<R: Read>(entry: &mut tar::Entry<'_, R>) -> Result<Self, Step> {
        let header = entry.header();
        let id = |id: u64| u32::try_from(id).map_err(|_| Step::Refused("its owner is out of range"));
        let (uid, gid) = (id(header.uid()?)?, id(header.gid()?)?);
        let mode = Mode::from_raw_mode(header.mode()? & 0o7777);
        let modified = i64::try_from(header.mtime()?).map_err(|_| Step::Refused("its time is out of range"))?;
        let mut modified = Timespec { tv_sec: modified, tv_nsec: 0 };
        let mut accessed = None;
        let mut extended = Vec::new();
        for record in entry.pax_extensions()?.into_iter().flatten() {
            let record = record?;
            let Ok(key) = record.key() else { continue };
            if let Some(name) = key.strip_prefix(PAX_ATTRIBUTE) {
                extended.push((name.to_owned(), record.value_bytes().to_vec()));
            } else if key.starts_with("GNU.sparse.") {
                return Err(Step::Refused("sparse members are not supported in ordinary layers"));
            } else if let ("mtime" | "atime", Ok(value)) = (key, record.value()) {
                let time = parse_time(value).ok_or(Step::Refused("its time is no number"))?;
                if key == "mtime" {
                    modified = time;
                } else {
                    accessed = Some(time);
                }
            }
        }
        let times = Timestamps { last_access: accessed.unwrap_or(modified), last_modification: modified };
        Ok(Self { uid, gid, mode, times, extended })
    }

    /// Gives them to what was made: owner first, since a change of owner clears capabilities and set-id bits.
    pub fn set(&self, parent: &Folder, base: &CStr, symlink: bool) -> Result<(), Step> {
        parent.set_owner(base, self.uid, self.gid)?;
        for (name, value) in &self.extended {
            // containerd keeps attributes out that only an administrator may set, overlay's own among them.
            if name.starts_with("trusted.") || name.starts_with("user.overlay.") {
                continue;
            }
            match parent.set_attribute(base, name, value) {
                Err(err) if err.raw_os_error() == Some(Errno::NOTSUP.raw_os_error()) => {}
                Err(err) if err.raw_os_error() == Some(Errno::PERM.raw_os_error()) && name.starts_with("user.") => {}
                other => other?,
            }
        }
        if !symlink {
            sys::chmodat(parent, base, self.mode, AtFlags::empty())?;
        }
        Ok(set_times(parent, base, &self.times)?)
    }
}

/// Sets last access and modification, of a symbolic link itself.
pub fn set_times(parent: &Folder, base: &CStr, times: &Timestamps) -> io::Result<()> {
    Ok(sys::utimensat(parent, base, times, AtFlags::SYMLINK_NOFOLLOW)?)
}

/// Makes the member; nothing of its name is there but, for a folder, perhaps a folder.
pub fn make<R: Read>(tree: &Tree<'_>, parent: &Folder, base: &CStr, entry: &mut tar::Entry<'_, R>) -> Result<(), Step> {
    let kind = entry.header().entry_type();
    let private = Mode::from_raw_mode(0o600);
    if kind.is_file() || kind.is_contiguous() {
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let mut file = File::from(sys::openat(parent, base, flags, private)?);
        io::copy(entry, &mut file)?;
        return Ok(());
    }
    if kind.is_dir() {
        return match sys::mkdirat(parent, base, Mode::from_raw_mode(0o700)) {
            Err(Errno::EXIST) => Ok(()),
            other => Ok(other?),
        };
    }
    if kind.is_symlink() {
        let to = entry.link_name_bytes().ok_or(Step::Refused("a symbolic link leads nowhere"))?;
        return Ok(sys::symlinkat(&*to, parent, base)?);
    }
    if kind.is_hard_link() {
        let to = entry.link_name_bytes().ok_or(Step::Refused("a hard link leads nowhere"))?;
        let (folder, to) = Name::of(&to).split().ok_or(Step::Refused("a hard link leads to the root"))?;
        let folder = tree.find(&folder)?.ok_or(Step::Refused("a hard link leads to what this layer does not hold"))?;
        return Ok(sys::linkat(&folder, &to, parent, base, AtFlags::empty())?);
    }
    let special = if kind.is_character_special() {
        FileType::CharacterDevice
    } else if kind.is_block_special() {
        FileType::BlockDevice
    } else if kind.is_fifo() {
        FileType::Fifo
    } else {
        return Err(Step::Refused("a member of this type is not supported in ordinary layers"));
    };
    let header = entry.header();
    let device = match special {
        // The fields of a fifo may be empty.
        FileType::Fifo => 0,
        _ => sys::makedev(header.device_major()?.unwrap_or(0), header.device_minor()?.unwrap_or(0)),
    };
    Ok(sys::mknodat(parent, base, special, private, device)?)
}

/// Seconds since 1970 with a fraction, as pax writes them.
fn parse_time(text: &str) -> Option<Timespec> {
    let (whole, fraction) = text.split_once('.').unwrap_or((text, ""));
    let seconds: i64 = whole.parse().ok()?;
    let digits: String = fraction.chars().take(9).collect();
    if !fraction.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let nanos: i64 = format!("{digits:0<9}").parse().ok()?;
    // The fraction of a time before 1970 counts downwards.
    Some(match (whole.starts_with('-'), nanos) {
        (true, 1..) => Timespec { tv_sec: seconds.checked_sub(1)?, tv_nsec: 1_000_000_000 - nanos },
        (_, nanos) => Timespec { tv_sec: seconds, tv_nsec: nanos },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_read_with_their_fraction() {
        let time = |text| parse_time(text).map(|t| (t.tv_sec, t.tv_nsec));
        assert_eq!(time("12"), Some((12, 0)));
        assert_eq!(time("12.5"), Some((12, 500_000_000)));
        assert_eq!(time("12.0000000019"), Some((12, 1)));
        assert_eq!(time("-1.25"), Some((-2, 750_000_000)));
        assert_eq!(time("x"), None);
        assert_eq!(time("1.x"), None);
    }
}
