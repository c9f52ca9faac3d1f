//! `linux.cgroupsPath` of the OCI spec in both of its forms.

use std::path::{Component, Path, PathBuf};

use crate::error::{Error, Kind, Result};

/// The cgroup's directory relative to the root of each hierarchy.
///
/// `/kubepods/pod1/abc` stands for itself; systemd's `slice:prefix:name` for the scope's directory below the nested
/// directories of its slice (`a-b.slice` lies in `a.slice`, systemd.slice(5)).
pub(crate) fn parse(text: &str) -> Result<PathBuf> {
    let error = || {
        Error::new(
            Kind::InvalidArgument,
            format!("linux.cgroupsPath {text:?} is neither a path without \"..\" nor slice:prefix:name"),
        )
    };
    let path = match text.split(':').collect::<Vec<_>>()[..] {
        [path] => PathBuf::from(path),
        [slice, prefix, name] if !name.is_empty() => {
            let mut path = slice_path(slice).ok_or_else(error)?;
            path.push(match (prefix, name.strip_suffix(".slice")) {
                (_, Some(_)) => name.to_owned(),
                ("", None) => format!("{name}.scope"),
                (prefix, None) => format!("{prefix}-{name}.scope"),
            });
            path
        }
        _ => return Err(error()),
    };
    let mut relative = PathBuf::new();
    for component in Path::new(&path).components() {
        match component {
            Component::RootDir | Component::CurDir => (),
            Component::Normal(name) => relative.push(name),
            Component::ParentDir | Component::Prefix(_) => return Err(error()),
        }
    }
    if relative.as_os_str().is_empty() || text.contains('\0') {
        return Err(error());
    }
    Ok(relative)
}

/// `a-b-c.slice` → `a.slice/a-b.slice/a-b-c.slice`; empty: `system.slice`; `-.slice` is the root.
fn slice_path(slice: &str) -> Option<PathBuf> {
    let slice = if slice.is_empty() { "system.slice" } else { slice };
    let stem = slice.strip_suffix(".slice").filter(|stem| !stem.contains('/'))?;
    if stem == "-" {
        return Some(PathBuf::new());
    }
    let mut path = PathBuf::new();
    let mut name = String::new();
    for part in stem.split('-') {
        if part.is_empty() {
            return None;
        }
        name.push_str(part);
        path.push(format!("{name}.slice"));
        name.push('-');
    }
    Some(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_forms_lead_to_a_directory() {
        let cases = [
            ("/default/vm1", "default/vm1"),
            ("kubepods/besteffort/pod1/abc", "kubepods/besteffort/pod1/abc"),
            (
                "kubepods-besteffort-pod1.slice:cri-containerd:abc",
                "kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod1.slice/cri-containerd-abc.scope",
            ),
            (":ovms:vm1", "system.slice/ovms-vm1.scope"),
            ("-.slice::vm1", "vm1.scope"),
            ("system.slice::vm1.slice", "system.slice/vm1.slice"),
        ];
        for (text, path) in cases {
            assert_eq!(parse(text).unwrap(), Path::new(path), "{text}");
        }
    }

    #[test]
    fn parse_outside_of_hierarchy_returns_invalid_argument() {
        for text in [
            "",
            "/",
            "/a/../../b",
            "a:b",
            "a.slice:b:",
            "a/b.slice:p:n",
            "a--b.slice:p:n",
            "x.slice:p:../../n",
            "a:b:c:d",
            "a\0b",
        ] {
            assert_eq!(parse(text).unwrap_err().kind(), Kind::InvalidArgument, "{text:?}");
        }
    }
}
