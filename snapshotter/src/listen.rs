//! The daemon's two sockets: passed by systemd, or made here.
//!
//! Under socket activation the daemon takes the descriptors of `LISTEN_FDS`; `LISTEN_FDNAMES` says which is which
//! (`ovms` and `bundle`, the names in the installed units), and without names the first is the gRPC socket. Whatever
//! was not passed is made: 0600, in a directory that is made 0700 if it is not there.

use std::env;
use std::fs;
use std::io::{self, ErrorKind};
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use listenfd::ListenFd;

use crate::error::{Context, Error, Result};

/// How long a predecessor's socket may outlive it.
const HANDOVER: Duration = Duration::from_secs(1);

/// The two sockets.
#[derive(Debug)]
pub struct Sockets {
    /// Snapshots and diff services.
    pub grpc: UnixListener,
    /// Bundle service.
    pub bundle: UnixListener,
    /// Socket files that were made here and go when the daemon ends.
    made: Vec<PathBuf>,
}

impl Sockets {
    /// Takes or makes the sockets. Must run before any thread is started, since it reads the environment's descriptors.
    pub fn open(grpc: &Path, bundle: &Path) -> Result<Self> {
        let names = env::var("LISTEN_FDNAMES").unwrap_or_default();
        let mut passed = ListenFd::from_env();
        let mut made = Vec::new();
        let mut take = |index: Option<usize>, path: &Path| -> Result<UnixListener> {
            let given = match index {
                Some(index) => {
                    passed.take_unix_listener(index).context(|| "the passed descriptor is no Unix socket")?
                }
                None => None,
            };
            match given {
                Some(listener) => Ok(listener),
                None => {
                    made.push(path.to_owned());
                    bind(path).context(|| format!("cannot listen on {}", path.display()))
                }
            }
        };
        let [first, second] = places(&names);
        let sockets = Self { grpc: take(first, grpc)?, bundle: take(second, bundle)?, made };
        for listener in [&sockets.grpc, &sockets.bundle] {
            listener.set_nonblocking(true).context(|| "cannot prepare a socket")?;
        }
        Ok(sockets)
    }
}

impl Drop for Sockets {
    fn drop(&mut self) {
        for path in &self.made {
            let _gone_already = fs::remove_file(path);
        }
    }
}

/// Places of the gRPC and the bundle socket among the passed descriptors.
fn places(names: &str) -> [Option<usize>; 2] {
    let place = |wanted: &str| names.split(':').position(|name| name == wanted);
    match (place("ovms"), place("bundle")) {
        (None, None) => [Some(0), Some(1)],
        (grpc, bundle) => [grpc, bundle],
    }
}

fn bind(path: &Path) -> io::Result<UnixListener> {
    if let Some(dir) = path.parent().filter(|dir| !dir.is_dir()) {
        fs::DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
    }
    // A worker that a killed daemon was just starting holds the old socket until it is a program of its own.
    let deadline = Instant::now() + HANDOVER;
    let mut served = UnixStream::connect(path);
    while served.is_ok() && Instant::now() < deadline {
        std::thread::sleep(HANDOVER / 100);
        served = UnixStream::connect(path);
    }
    match served {
        Ok(_) => return Err(io::Error::new(ErrorKind::AddrInUse, "another process serves it")),
        Err(err) if err.kind() == ErrorKind::ConnectionRefused => fs::remove_file(path)?,
        Err(err) if err.kind() == ErrorKind::NotFound => {}
        Err(err) => return Err(err),
    }
    let listener = UnixListener::bind(path)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o600))?;
    Ok(listener)
}

impl From<Error> for io::Error {
    fn from(error: Error) -> Self {
        io::Error::other(error)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_decide_which_descriptor_is_which() {
        assert_eq!(places(""), [Some(0), Some(1)]);
        assert_eq!(places("bundle:ovms"), [Some(1), Some(0)]);
        assert_eq!(places("ovms"), [Some(0), None]);
    }

    #[test]
    fn bind_makes_a_private_socket_and_replaces_a_dead_one() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("run/ovms.sock");
        drop(bind(&path).unwrap());
        let alive = bind(&path).unwrap();
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode(&path), mode(path.parent().unwrap())), (0o600, 0o700));
        assert_eq!(bind(&path).unwrap_err().kind(), ErrorKind::AddrInUse);
        drop(alive);
    }
}
