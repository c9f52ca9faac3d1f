//! The server's socket: where it lies, and binding it so that nobody else gets in.

use std::fs::{self, DirBuilder, Permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use crate::error::{Error, Kind, Result};

/// Where containerd's shims put their sockets: short, because a socket's path is.
const SOCKET_DIR: &str = "/run/containerd/s";
/// The longest path of a socket: `sun_path` of unix(7) without its final zero.
const MAX_PATH: usize = 107;

/// The socket of a container: the convention of containerd's own shims, so that every container has one path.
pub(super) fn path(dir: Option<&Path>, address: &str, namespace: &str, id: &str) -> Result<PathBuf> {
    let digest = Sha256::digest(Path::new(address).join(namespace).join(id).as_os_str().as_encoded_bytes());
    let path = dir.unwrap_or(Path::new(SOCKET_DIR)).join(hex::encode(digest));
    if path.as_os_str().len() > MAX_PATH {
        return Err(Error::new(
            Kind::Invalid,
            format!(
                "the socket's path {} is longer than {MAX_PATH} bytes: choose a shorter state directory",
                path.display()
            ),
        ));
    }
    Ok(path)
}

/// What [`bind`] found.
pub(super) enum Bound {
    /// A new socket, listening.
    New(UnixListener),
    /// A server that answers already.
    Alive,
}

/// Binds `path` with mode 0600, taking the place of a socket that nobody listens on.
pub(super) fn bind(path: &Path) -> Result<Bound> {
    let failed = |source| Error::caused(format!("cannot bind the socket {}", path.display()), source);
    if let Some(dir) = path.parent() {
        DirBuilder::new().recursive(true).mode(0o711).create(dir).map_err(failed)?;
    }
    let listener = match UnixListener::bind(path) {
        Ok(listener) => listener,
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
            if UnixStream::connect(path).is_ok() {
                return Ok(Bound::Alive);
            }
            fs::remove_file(path).map_err(failed)?;
            UnixListener::bind(path).map_err(failed)?
        }
        Err(error) => return Err(failed(error)),
    };
    fs::set_permissions(path, Permissions::from_mode(0o600)).map_err(failed)?;
    Ok(Bound::New(listener))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn path_is_that_of_containerds_shims() {
        // sha256 of "/run/containerd/containerd.sock/default/vm1"
        let path = path(None, "/run/containerd/containerd.sock", "default", "vm1").unwrap();
        let name = path.file_name().unwrap().to_str().unwrap();
        assert_eq!(path.parent(), Some(Path::new(SOCKET_DIR)));
        assert_eq!(name, hex::encode(Sha256::digest(b"/run/containerd/containerd.sock/default/vm1")));
    }

    #[test]
    fn path_too_long_for_a_socket_returns_invalid() {
        let dir = PathBuf::from(format!("/{}", "d".repeat(60)));
        assert_eq!(path(Some(&dir), "a", "n", "i").unwrap_err().kind(), Kind::Invalid);
    }

    #[test]
    fn bind_replaces_a_dead_socket_and_leaves_a_live_one() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        drop(UnixListener::bind(&path).unwrap());

        let Bound::New(listener) = bind(&path).unwrap() else { panic!("a dead socket counts as alive") };
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert!(matches!(bind(&path).unwrap(), Bound::Alive));
        drop(listener);
    }
}
