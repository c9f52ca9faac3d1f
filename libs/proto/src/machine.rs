//! Client → engine: what may be asked of a machine that another process runs (a shim, `ovm run`). Each machine's engine
//! listens at [`SOCKET`] in the machine's directory, `<runtime>/machines/<namespace>/<id>/`, which only root may enter.
//! One request line, any number of [`FromMachine::Progress`] lines, one line that answers; then the engine closes.
//! A client that hangs up cancels a snapshot that it asked for.

use std::fs::File;
use std::io::{self, BufReader};
use std::net::Shutdown;
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use thiserror::Error;

pub use crate::bundle::{read_line, write_line, RefusalKind};

/// The socket's name in the machine's directory.
pub const SOCKET: &str = "machine.sock";

/// What a client asks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ToMachine {
    /// Press the ACPI power button.
    PowerButton,
    /// End the machine.
    Kill,
    /// Stop the vCPUs.
    Pause,
    /// Let the vCPUs go on.
    Resume,
    /// Freeze the disk's top, so that what was written until now can be read from plain files that never change again.
    FreezeDisk,
    /// Take a RAM snapshot into `dir`, an existing empty directory: see `ovms_bundle::SnapshotRecord` for what is there
    /// afterwards.
    Snapshot {
        /// Absolute path of the directory.
        dir: PathBuf,
        /// Write all of the memory even if the machine was restored from a RAM snapshot.
        full: bool,
        /// Leave the vCPUs standing after the instant.
        stop: bool,
    },
}

/// What the engine answers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FromMachine {
    /// Work goes on; a sentence for the user.
    Progress(String),
    /// Done. After [`ToMachine::FreezeDisk`] the bundle's record lists the frozen tops; after [`ToMachine::Snapshot`] the
    /// directory is complete.
    Done {
        /// Microseconds for which the guest stood still; 0 for what does not stop it.
        stood_micros: u64,
    },
    /// It cannot be; the machine goes on as it was.
    Refused {
        /// What the client should make of it.
        kind: RefusalKind,
        /// The whole error chain in one line.
        message: String,
    },
}

/// Why a request to a machine's engine came to nothing.
#[derive(Debug, Error)]
pub enum RequestError {
    /// Nobody listens there: the machine has ended, or its engine is gone.
    #[error("the machine's engine cannot be reached at {}", path.display())]
    Connect {
        /// The socket.
        path: PathBuf,
        /// What the system says.
        #[source]
        source: io::Error,
    },
    /// The conversation broke.
    #[error("the conversation with the machine's engine failed")]
    Io(#[source] io::Error),
    /// The engine closed without an answer: it ended, or [`Canceller::cancel`] was called.
    #[error("the machine's engine has hung up before it answered")]
    Closed,
    /// The engine says no; the machine goes on as it was.
    #[error("{message}")]
    Refused {
        /// What to make of it.
        kind: RefusalKind,
        /// The engine's whole error chain in one line.
        message: String,
    },
}

/// A connection to a machine's engine, good for one request. It blocks.
#[derive(Debug)]
pub struct Client {
    stream: UnixStream,
}

/// Ends a [`Client`]'s request from another thread.
#[derive(Debug)]
pub struct Canceller {
    stream: UnixStream,
}

impl Canceller {
    /// Hangs up. The engine cancels a snapshot that was asked for; [`Client::request`] returns [`RequestError::Closed`].
    pub fn cancel(&self) {
        // It fails if the other side was faster.
        let _ = self.stream.shutdown(Shutdown::Both);
    }
}

impl Client {
    /// Connects to the socket of a machine; its path may be longer than a socket's address holds.
    ///
    /// # Errors
    /// [`RequestError::Connect`].
    pub fn connect(socket: &Path) -> Result<Self, RequestError> {
        let connect = || UnixStream::connect(Place::of(socket)?.address());
        let stream = connect().map_err(|source| RequestError::Connect { path: socket.to_owned(), source })?;
        Ok(Self { stream })
    }

    /// What ends the request from another thread.
    ///
    /// # Errors
    /// [`RequestError::Io`].
    pub fn canceller(&self) -> Result<Canceller, RequestError> {
        Ok(Canceller { stream: self.stream.try_clone().map_err(RequestError::Io)? })
    }

    /// Sends the request and waits for its answer, however long that takes; `progress` gets a sentence now and then. Returns
    /// the microseconds for which the guest stood still.
    ///
    /// # Errors
    /// [`RequestError`].
    pub fn request(mut self, request: &ToMachine, progress: &mut dyn FnMut(&str)) -> Result<u64, RequestError> {
        write_line(&mut self.stream, request).map_err(hung_up)?;
        let mut answers = BufReader::new(self.stream);
        loop {
            match read_line(&mut answers).map_err(hung_up)? {
                Some(FromMachine::Progress(sentence)) => progress(&sentence),
                Some(FromMachine::Done { stood_micros }) => return Ok(stood_micros),
                Some(FromMachine::Refused { kind, message }) => return Err(RequestError::Refused { kind, message }),
                None => return Err(RequestError::Closed),
            }
        }
    }
}

fn hung_up(err: io::Error) -> RequestError {
    match err.kind() {
        io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => RequestError::Closed,
        _ => RequestError::Io(err),
    }
}

/// Listens at a path that may be longer than a socket's address holds. The file's mode is left to the umask: the
/// directory keeps strangers out.
///
/// # Errors
/// That of the system.
pub fn listen(socket: &Path) -> io::Result<UnixListener> {
    UnixListener::bind(Place::of(socket)?.address())
}

/// A socket's file named by way of its directory's descriptor: an address holds 107 bytes (`UNIX_PATH_MAX` of the kernel's
/// include/uapi/linux/un.h), a machine's directory may have more.
struct Place {
    dir: File,
    name: PathBuf,
}

impl Place {
    fn of(socket: &Path) -> io::Result<Self> {
        let parts = socket.parent().zip(socket.file_name());
        let (dir, name) = parts.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "no path of a socket"))?;
        Ok(Self { dir: File::open(dir)?, name: name.into() })
    }

    fn address(&self) -> PathBuf {
        Path::new("/proc/self/fd").join(self.dir.as_raw_fd().to_string()).join(&self.name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::thread;

    /// A socket with a long path, whose server reads the request, says `lines` and closes.
    fn serve(lines: &'static str) -> (tempfile::TempDir, PathBuf, thread::JoinHandle<Option<ToMachine>>) {
        let dir = tempfile::tempdir().unwrap();
        let long = dir.path().join("x".repeat(100));
        std::fs::create_dir(&long).unwrap();
        let path = long.join(SOCKET);
        let listener = listen(&path).unwrap();
        let server = thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let request = read_line(&mut BufReader::new(&stream)).unwrap();
            stream.write_all(lines.as_bytes()).unwrap();
            request
        });
        (dir, path, server)
    }

    #[test]
    fn a_request_gets_its_progress_and_its_answer() {
        let (_dir, path, server) = serve("{\"progress\":\"half\"}\n{\"done\":{\"stood_micros\":7}}\n");
        let mut said = Vec::new();
        let stood = Client::connect(&path).unwrap().request(&ToMachine::Pause, &mut |text| said.push(text.to_owned()));
        assert_eq!((stood.unwrap(), said), (7, vec!["half".to_owned()]));
        assert_eq!(server.join().unwrap(), Some(ToMachine::Pause));
    }

    #[test]
    fn request_refused_returns_its_kind_and_closed_without_answer_returns_closed() {
        let (_dir, path, _server) = serve("{\"refused\":{\"kind\":\"precondition\",\"message\":\"no\"}}\n");
        let err = Client::connect(&path).unwrap().request(&ToMachine::Kill, &mut |_| ()).unwrap_err();
        assert!(matches!(err, RequestError::Refused { kind: RefusalKind::Precondition, .. }), "{err}");
        let (_dir, path, _server) = serve("");
        let err = Client::connect(&path).unwrap().request(&ToMachine::Kill, &mut |_| ()).unwrap_err();
        assert!(matches!(err, RequestError::Closed), "{err}");
    }

    #[test]
    fn connect_nobody_there_returns_the_path() {
        let err = Client::connect(Path::new("/no/such/machine.sock")).unwrap_err();
        assert!(err.to_string().contains("/no/such/machine.sock"), "{err}");
    }

    #[test]
    fn cancel_ends_a_request_that_waits() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(SOCKET);
        let listener = listen(&path).unwrap();
        let client = Client::connect(&path).unwrap();
        let canceller = client.canceller().unwrap();
        let (stream, _) = listener.accept().unwrap();
        let waiting = thread::spawn(move || client.request(&ToMachine::FreezeDisk, &mut |_| ()));
        let mut reader = BufReader::new(stream);
        assert_eq!(read_line(&mut reader).unwrap(), Some(ToMachine::FreezeDisk));
        canceller.cancel();
        assert!(matches!(waiting.join().unwrap(), Err(RequestError::Closed)));
        assert_eq!(read_line::<ToMachine>(&mut reader).unwrap(), None);
    }
}
