//! The machine's socket, at which other processes ask something of the machine (`ovms_proto::machine`). The monitor
//! accepts, a thread for each client answers; between requests there is no thread and no memory.

use std::fs;
use std::io::{self, BufReader, ErrorKind};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use nix::poll::{poll, PollFd, PollFlags, PollTimeout};
use ovms_proto::machine::{listen, read_line, write_line, FromMachine, RefusalKind, ToMachine};

use crate::error::{Error, Kind, Result};
use crate::machine::Machine;
use crate::shared::Inner;
use crate::snapshot::SnapshotOptions;

/// The most clients that are served at once.
const MAX_CLIENTS: usize = 8;
/// How long a client may take to say what it wants, and to read what it is told.
const PATIENCE: Duration = Duration::from_secs(10);
/// Stack of a client's thread; writing a disk's diff needs most.
const STACK: usize = 512 << 10;

/// The listening socket.
#[derive(Debug)]
pub(crate) struct Server {
    listener: UnixListener,
    clients: Arc<AtomicUsize>,
}

impl Server {
    /// Listens in the machine's directory, which must not have a socket yet.
    pub(crate) fn listen(path: &Path) -> Result<Self> {
        let open = || -> io::Result<UnixListener> {
            let listener = listen(path)?;
            fs::set_permissions(path, fs::Permissions::from_mode(0o600))?;
            listener.set_nonblocking(true)?;
            Ok(listener)
        };
        let listener = open().map_err(Error::io(format!("the machine's socket {} cannot be made", path.display())))?;
        Ok(Self { listener, clients: Arc::default() })
    }

    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.listener.as_fd()
    }

    /// Takes who waits; does not block.
    pub(crate) fn accept(&self, inner: &Arc<Inner>) {
        match self.listener.accept() {
            Ok((stream, _)) => self.hand_over(inner, stream),
            Err(err) if matches!(err.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => (),
            Err(err) => {
                tracing::warn!(id = inner.id, %err, "a client of the machine's socket cannot be taken");
                // Out of descriptors, most likely: the client goes on waiting, and must not keep the monitor busy.
                thread::sleep(Duration::from_millis(10));
            }
        }
    }

    fn hand_over(&self, inner: &Arc<Inner>, mut stream: UnixStream) {
        let seat = Seat(Arc::clone(&self.clients));
        if seat.0.fetch_add(1, Ordering::Relaxed) >= MAX_CLIENTS {
            let message = format!("{MAX_CLIENTS} clients talk to machine {} already", inner.id);
            // An empty socket takes one line without blocking.
            let _ = write_line(&mut stream, &FromMachine::Refused { kind: RefusalKind::Precondition, message });
            return;
        }
        let machine = Machine::new(Arc::clone(inner));
        let spawned = thread::Builder::new().name("ovms-client".into()).stack_size(STACK).spawn(move || {
            let _seat = seat;
            if let Err(err) = converse(&machine, &stream) {
                tracing::debug!(id = machine.id(), %err, "a client of the machine's socket has left");
            }
        });
        if let Err(err) = spawned {
            tracing::warn!(id = inner.id, %err, "a client of the machine's socket cannot be served");
        }
    }
}

/// A client's place among [`MAX_CLIENTS`].
struct Seat(Arc<AtomicUsize>);

impl Drop for Seat {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

fn converse(machine: &Machine, stream: &UnixStream) -> io::Result<()> {
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    let mut writer = stream;
    let request = match read_line::<ToMachine>(&mut BufReader::new(stream)) {
        Ok(Some(request)) => request,
        Ok(None) => return Ok(()),
        Err(err) if err.kind() == ErrorKind::InvalidData => {
            let message = format!("the request cannot be read: {err}");
            return write_line(&mut writer, &FromMachine::Refused { kind: RefusalKind::Invalid, message });
        }
        Err(err) => return Err(err),
    };
    tracing::debug!(id = machine.id(), ?request, "a client asks");
    let answer = match answer(machine, stream, request) {
        Ok(stood_micros) => FromMachine::Done { stood_micros },
        Err(err) => FromMachine::Refused { kind: refusal_kind(err.kind()), message: err.chain() },
    };
    write_line(&mut writer, &answer)
}

fn answer(machine: &Machine, stream: &UnixStream, request: ToMachine) -> Result<u64> {
    match request {
        ToMachine::PowerButton => machine.power_button()?,
        ToMachine::Kill => machine.kill()?,
        ToMachine::Pause => machine.pause()?,
        ToMachine::Resume => machine.resume()?,
        ToMachine::FreezeDisk => machine.freeze_disk()?,
        ToMachine::Snapshot { dir, full, stop } => {
            if !dir.is_absolute() {
                let message = format!("the snapshot's directory {} is no absolute path", dir.display());
                return Err(Error::new(Kind::InvalidArgument, message));
            }
            let mut writer = stream;
            let mut progress = |sentence: &str| {
                // One who does not listen has hung up or will.
                let _ = write_line(&mut writer, &FromMachine::Progress(sentence.to_owned()));
            };
            let options = SnapshotOptions { full, stop };
            let taken = machine.snapshot(&dir, options, &mut progress, &|| has_hung_up(stream))?;
            return Ok(taken.ram.stood_micros);
        }
    }
    Ok(0)
}

fn has_hung_up(stream: &UnixStream) -> bool {
    let gone = PollFlags::POLLHUP | PollFlags::POLLERR;
    let mut fds = [PollFd::new(stream.as_fd(), PollFlags::empty())];
    poll(&mut fds, PollTimeout::ZERO).is_ok() && fds[0].revents().is_some_and(|events| events.intersects(gone))
}

fn refusal_kind(kind: Kind) -> RefusalKind {
    match kind {
        Kind::NotFound => RefusalKind::NotFound,
        Kind::InvalidArgument => RefusalKind::Invalid,
        Kind::AlreadyExists | Kind::FailedPrecondition => RefusalKind::Precondition,
        Kind::Unavailable | Kind::Internal => RefusalKind::Internal,
    }
}
