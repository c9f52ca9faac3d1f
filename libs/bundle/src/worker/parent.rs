//! The parent's side: make the files, start the worker, take its replies as hostile.

use std::{
    fs::{File, OpenOptions},
    io::{self, BufReader, IoSlice},
    mem::MaybeUninit,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::{fs::OpenOptionsExt, net::UnixStream, process::ExitStatusExt},
    },
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
};

use ovms_artifact::digest::Digest;
use ovms_disk::State;
use rustix::net::{sendmsg, SendAncillaryBuffer, SendAncillaryMessage, SendFlags};

use super::{
    wire::{self, Done, Reply, Request, Task, MAX_FILES},
    DiskFound, Job, Outcome, Progress, Unpacked, ARG,
};
use crate::{layer, Error, Result};

/// The ids that a worker of a privileged parent runs under: nobody's.
const NOBODY: (u32, u32) = (65_534, 65_534);
/// The longest refusal that is passed on.
const MAX_WHY: usize = 2000;

/// How workers are started.
#[derive(Debug, Clone)]
pub struct Launcher {
    program: PathBuf,
    ids: Option<(u32, u32)>,
}

impl Default for Launcher {
    fn default() -> Self {
        Self::new()
    }
}

impl Launcher {
    /// Starts this very program again, under the user and group id 65534 where this process is root, else as it is.
    #[must_use]
    pub fn new() -> Launcher {
        let ids = rustix::process::geteuid().is_root().then_some(NOBODY);
        Launcher { program: "/proc/self/exe".into(), ids }
    }

    /// Unpacks one layer; blocks until the worker is gone. On an error, and for an ordinary layer or one without a
    /// disk, nothing is left in the directory.
    ///
    /// # Errors
    /// [`Error::Refused`] if the layer is not accepted, [`Error::Worker`] if the worker failed, [`Error::Io`].
    pub fn unpack(&self, job: Job<'_>, progress: &mut dyn FnMut(Progress)) -> Result<Outcome> {
        let (dir, name) = (job.dir.to_owned(), job.name.to_owned());
        let outcome = self.run(job, progress);
        if !matches!(&outcome, Ok(Outcome::Layer(Unpacked { disk: Some(_), .. }))) {
            for path in [layer::data_path(&dir), layer::map_path(&dir)] {
                match std::fs::remove_file(&path) {
                    Err(e) if e.kind() != io::ErrorKind::NotFound && outcome.is_ok() => {
                        return Err(Error::io("remove", path)(e));
                    }
                    _ => {}
                }
            }
        }
        outcome.map_err(|e| match e {
            Error::Worker { why, .. } => Error::Worker { name, why },
            Error::Refused { why, .. } => Error::Refused { name, why },
            other => other,
        })
    }

    fn run(&self, job: Job<'_>, progress: &mut dyn FnMut(Progress)) -> Result<Outcome> {
        let (data_path, map_path) = (layer::data_path(job.dir), layer::map_path(job.dir));
        let (data, map) = (create(&data_path)?, create(&map_path)?);
        let scratch = tempfile::tempfile_in(job.dir).map_err(Error::io("create a file in", job.dir))?;
        let request = Request {
            task: Task::Layer {
                source: job.source,
                expect: job.expect.map(|(digest, size)| (digest.to_string(), size)),
                limits: job.limits,
            },
            ids: self.ids,
        };
        let mut told = |step| {
            progress(step);
            true
        };
        let files = [job.input.as_fd(), data.as_fd(), map.as_fd(), scratch.as_fd()];
        match self.converse(&request, &files, &mut told)? {
            Reply::Done(done) => accept(done, (&data, &data_path), (&map, &map_path)),
            Reply::Ordinary { first } => Ok(Outcome::Ordinary { first: printable(&first) }),
            _ => Err(failed("it answered what it was not asked".into())),
        }
    }

    /// Starts a worker, hands it a request and waits until it is gone; returns its good answer. The worker is killed if
    /// `progress` returns `false`.
    pub(super) fn converse(
        &self,
        request: &Request,
        files: &[BorrowedFd<'_>],
        progress: &mut dyn FnMut(Progress) -> bool,
    ) -> Result<Reply> {
        self.begin(request, files)?.end(progress)
    }

    /// Starts a worker and hands it a request.
    pub(super) fn begin(&self, request: &Request, files: &[BorrowedFd<'_>]) -> Result<Conversation> {
        let (ours, theirs) = UnixStream::pair().map_err(|e| failed(format!("cannot make a socket: {e}")))?;
        let mut command = Command::new(&self.program);
        command.arg(ARG).env_clear().current_dir("/").stdin(OwnedFd::from(theirs)).stdout(Stdio::null());
        let child = Reaped(command.spawn().map_err(|e| failed(format!("cannot start: {e}")))?);
        drop(command);
        send(&ours, request, files).map_err(|e| failed(format!("cannot send the request: {e}")))?;
        Ok(Conversation { socket: ours, child })
    }

    pub(super) fn ids(&self) -> Option<(u32, u32)> {
        self.ids
    }
}

/// A worker that has its request.
pub(super) struct Conversation {
    socket: UnixStream,
    child: Reaped,
}

impl Conversation {
    /// Waits until the worker is gone; returns its good answer. The worker is killed if `progress` returns `false`.
    pub(super) fn end(self, progress: &mut dyn FnMut(Progress) -> bool) -> Result<Reply> {
        let Self { socket, mut child } = self;
        let reply = listen(&socket, progress)?;
        drop(socket);
        let status = child.0.wait().map_err(|e| failed(format!("cannot be waited for: {e}")))?;
        match reply {
            Some(Reply::Refused { why }) => Err(Error::Refused { name: String::new(), why: printable(&why) }),
            Some(reply) if status.success() => Ok(reply),
            _ => Err(failed(format!("it ended without an answer ({})", describe(status)))),
        }
    }
}

/// Kills and reaps the worker however the parent leaves.
struct Reaped(Child);

impl Drop for Reaped {
    fn drop(&mut self) {
        // After a wait both do nothing.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

pub(super) fn failed(why: String) -> Error {
    Error::Worker { name: String::new(), why }
}

pub(super) fn create(path: &Path) -> Result<File> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).create_new(true).mode(0o600);
    options.open(path).map_err(Error::io("create", path))
}

fn send(socket: &UnixStream, request: &Request, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
    let mut line = Vec::new();
    wire::write(&mut line, request)?;
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FILES))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !control.push(SendAncillaryMessage::ScmRights(fds)) {
        return Err(io::ErrorKind::OutOfMemory.into());
    }
    let sent = sendmsg(socket.as_fd(), &[IoSlice::new(&line)], &mut control, SendFlags::NOSIGNAL)?;
    io::Write::write_all(&mut &*socket, line.get(sent..).unwrap_or_default())
}

/// Reads replies until the last one; `None` if the worker ended without.
fn listen(socket: &UnixStream, progress: &mut dyn FnMut(Progress) -> bool) -> Result<Option<Reply>> {
    let mut reader = BufReader::new(socket);
    loop {
        match wire::read(&mut reader) {
            Ok(Some(Reply::Progress(step))) if progress(step) => {}
            Ok(Some(Reply::Progress(_))) => return Err(Error::Cancelled),
            Ok(last) => return Ok(last),
            // A reset is what a killed worker leaves.
            Err(e) if e.kind() == io::ErrorKind::ConnectionReset => return Ok(None),
            Err(e) => return Err(failed(format!("it broke its protocol: {e}"))),
        }
    }
}

/// Checks what the worker says by what it left.
fn accept(done: Done, data: (&File, &Path), map: (&File, &Path)) -> Result<Outcome> {
    let digest = |text: String| -> Result<Digest> { text.parse().map_err(|_| failed("its digest is none".into())) };
    let disk = match done.disk {
        None => None,
        Some(disk) => {
            let found = ovms_disk::LayerMap::read_from(map.0).map_err(Error::disk(map.1))?;
            let length = data.0.metadata().map_err(Error::io("read", data.1))?.len();
            let data_end = found.extents().filter(|e| e.state == State::Data).last().map_or(0, |e| e.start + e.len);
            if length < data_end {
                return Err(failed(format!("its data file has {length} bytes, its map needs {data_end}")));
            }
            data.0.sync_all().map_err(Error::io("sync", data.1))?;
            map.0.sync_all().map_err(Error::io("sync", map.1))?;
            Some(DiskFound {
                format: disk.format,
                file_size: disk.file_size,
                file_digest: disk.file_digest.map(digest).transpose()?,
                bare: disk.bare,
                virtual_size: found.virtual_size(),
                data_bytes: found.bytes_of(State::Data),
            })
        }
    };
    let diff_id = done.diff_id.map(digest).transpose()?;
    Ok(Outcome::Layer(Unpacked { diff_id, size: done.size, disk, descriptor: done.descriptor }))
}

pub(super) fn printable(text: &str) -> String {
    text.chars().filter(|c| !c.is_control()).take(MAX_WHY).collect()
}

fn describe(status: ExitStatus) -> String {
    match status.signal() {
        Some(libc::SIGSYS) => "killed for a system call outside of its filter".into(),
        Some(libc::SIGXFSZ) => "killed for writing more than it may".into(),
        Some(signal) => format!("killed by signal {signal}"),
        None => format!("exit code {}", status.code().unwrap_or(-1)),
    }
}
