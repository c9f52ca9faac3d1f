//! The worker's side: take the request, put up the walls, parse, answer.

use std::{
    fs::File,
    io::{self, BufReader, Read, Write},
    mem::MaybeUninit,
    os::{
        fd::{AsFd, OwnedFd},
        unix::net::UnixStream,
    },
    process::ExitCode,
};

use ovms_artifact::{
    digest::{Digest, VerifyingReader},
    layer::{self as blob, DiskFile, Encoding, LayerError, LayerSummary},
    manifest::DiskFormat,
};
use ovms_disk::layer::{self, Format};
use ovms_proto::chain;
use rustix::net::{recvmsg, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags};

use super::{
    jail, ram,
    wire::{self, Done, DoneDisk, Reply, Request, Task, MAX_FILES},
    Limits, Progress, Source,
};

/// Bytes between two progress lines.
const STEP: u64 = 8 << 20;

/// The descriptors of a layer's request, in their order on the wire.
struct Files {
    input: File,
    data: File,
    map: File,
    scratch: File,
}

pub(super) fn main() -> ExitCode {
    if close_inherited().is_err() {
        return ExitCode::FAILURE;
    }
    let socket = match rustix::io::dup(io::stdin()) {
        Ok(fd) => UnixStream::from(fd),
        Err(_) => return ExitCode::FAILURE,
    };
    match serve(&socket) {
        Ok(()) => ExitCode::SUCCESS,
        Err(why) => {
            // Without a parent there is no one left to tell.
            let _ = wire::write(&mut &socket, &Reply::Refused { why });
            ExitCode::FAILURE
        }
    }
}

/// Closes what a parent may have left open across exec, such as the sockets that systemd passed to it.
fn close_inherited() -> io::Result<()> {
    let mut open = Vec::new();
    for entry in std::fs::read_dir("/proc/self/fd")? {
        open.extend(entry?.file_name().to_str().and_then(|name| name.parse::<i32>().ok()));
    }
    for fd in open.into_iter().filter(|fd| *fd > 2) {
        // The listing's own descriptor is in the list and closed already.
        let _ = nix::unistd::close(fd);
    }
    Ok(())
}

fn serve(mut socket: &UnixStream) -> Result<(), String> {
    let (request, files) = receive(socket).map_err(|e| format!("cannot receive the request: {e}"))?;
    let mut tell = Teller { socket, last: 0 };
    let reply = match request.task {
        Task::Layer { source, expect, limits } => {
            let job = LayerTask { source, expect, limits };
            // A data file is as long as its disk, however little of it is there.
            jail::enter(limits.disk_virtual.max(limits.layer_data), request.ids)?;
            unpack(&job, files, &mut tell)?
        }
        Task::Look { source, limits } => {
            jail::enter(0, request.ids)?;
            look(&source, limits, files)?
        }
        Task::Ram { blobs, max_memory, threads } => {
            let pool = ram::Pool::start(threads)?;
            jail::enter(max_memory, request.ids)?;
            ram::unpack(pool, &blobs, max_memory, files, &mut tell)
        }
    };
    wire::write(&mut socket, &reply).map_err(|e| format!("cannot answer: {e}"))
}

/// A layer to unpack.
struct LayerTask {
    source: Source,
    expect: Option<(String, u64)>,
    limits: Limits,
}

fn receive(socket: &UnixStream) -> io::Result<(Request, Vec<File>)> {
    let mut line = vec![0_u8; 64 << 10];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FILES))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let got = recvmsg(socket.as_fd(), &mut [io::IoSliceMut::new(&mut line)], &mut control, RecvFlags::CMSG_CLOEXEC)?;
    let files = control
        .drain()
        .filter_map(|message| match message {
            RecvAncillaryMessage::ScmRights(fds) => Some(fds),
            _ => None,
        })
        .flatten()
        .map(|fd: OwnedFd| File::from(fd))
        .collect();
    let missing = || io::Error::new(io::ErrorKind::InvalidData, "there is no request");
    // The rest of a long request, without descriptors.
    let mut reader = BufReader::new(line.get(..got.bytes).unwrap_or_default().chain(socket));
    Ok((wire::read(&mut reader)?.ok_or_else(missing)?, files))
}

fn unpack(task: &LayerTask, files: Vec<File>, tell: &mut Teller<'_>) -> Result<Reply, String> {
    let mut files = files.into_iter();
    let mut next = || files.next().ok_or("a descriptor is missing");
    let files = Files { input: next()?, data: next()?, map: next()?, scratch: next()? };
    match &task.source {
        Source::Disk { format } => unpack_disk(*format, task, &files, tell),
        Source::Layer { media_type, format } => {
            let encoding = Encoding::identify(media_type, format.as_deref()).map_err(|e| chain(&e))?;
            unpack_layer(encoding, task, files, tell)
        }
    }
}

fn unpack_layer(encoding: Encoding, task: &LayerTask, files: Files, tell: &mut Teller<'_>) -> Result<Reply, String> {
    let Files { input, data, map, scratch } = files;
    let input: Box<dyn Read> = match &task.expect {
        None => Box::new(input),
        Some((digest, size)) => {
            let digest: Digest = digest.parse().map_err(|e: ovms_artifact::digest::DigestError| chain(&e))?;
            Box::new(VerifyingReader::new(input, digest, *size))
        }
    };
    let mut visit = |disk: DiskFile<'_>| -> blob::VisitResult {
        let written = match disk_format(disk.format)? {
            Format::Raw => layer::convert_stream(disk.reader, disk.size, &data, &disk_limits(task), &mut |d, t| {
                tell.progress(d, t);
            })?,
            Format::Qcow2 => {
                spool(disk.reader, &scratch, disk.size, tell)?;
                convert(&scratch, Format::Qcow2, &data, task, tell)?
            }
        };
        Ok(written.write_to(&map)?)
    };
    let input = BufReader::with_capacity(256 << 10, input);
    answer(blob::read(input, encoding, &blob_limits(task.limits), &mut visit))
}

/// Reads a layer without keeping anything of it. That it is the right blob is seen by who sends it.
fn look(source: &Source, limits: Limits, files: Vec<File>) -> Result<Reply, String> {
    let Source::Layer { media_type, format } = source else { return Err("there is no layer to look at".into()) };
    let input = files.into_iter().next().ok_or("a descriptor is missing")?;
    let encoding = Encoding::identify(media_type, format.as_deref()).map_err(|e| chain(&e))?;
    match blob::read(BufReader::with_capacity(256 << 10, input), encoding, &blob_limits(limits), &mut |_| Ok(())) {
        Err(LayerError::Empty) => Ok(Reply::Empty),
        found => answer(found),
    }
}

fn answer(found: Result<LayerSummary, LayerError>) -> Result<Reply, String> {
    match found {
        Ok(found) => Ok(Reply::Done(Done {
            diff_id: Some(found.diff_id.to_string()),
            size: found.size,
            disk: found.disk.map(|disk| DoneDisk {
                format: disk.format,
                file_size: disk.size,
                file_digest: disk.digest.map(|d| d.to_string()),
                bare: disk.bare,
            }),
            descriptor: found.descriptor.map(String::from_utf8).transpose().map_err(|e| chain(&e))?,
        })),
        Err(LayerError::Ordinary(first)) => Ok(Reply::Ordinary { first }),
        Err(e) => Ok(Reply::Refused { why: chain(&e) }),
    }
}

fn blob_limits(limits: Limits) -> blob::Limits {
    blob::Limits { disk: limits.layer_data, ratio: limits.layer_ratio }
}

fn unpack_disk(format: DiskFormat, task: &LayerTask, files: &Files, tell: &mut Teller<'_>) -> Result<Reply, String> {
    let file_size = files.input.metadata().map_err(|e| chain(&e))?.len();
    let converted = disk_format(format)
        .map_err(|e| chain(&*e))
        .and_then(|f| convert(&files.input, f, &files.data, task, tell).map_err(|e| chain(&e)))
        .and_then(|map| map.write_to(&files.map).map_err(|e| chain(&e)));
    Ok(match converted {
        Err(why) => Reply::Refused { why },
        Ok(()) => Reply::Done(Done {
            diff_id: None,
            size: file_size,
            disk: Some(DoneDisk { format, file_size, file_digest: None, bare: true }),
            descriptor: None,
        }),
    })
}

fn convert(
    source: &File,
    format: Format,
    data: &File,
    task: &LayerTask,
    tell: &mut Teller<'_>,
) -> ovms_disk::Result<ovms_disk::LayerMap> {
    layer::convert(source, format, data, &disk_limits(task), &mut |done, total| tell.progress(done, total))
}

fn disk_format(format: DiskFormat) -> Result<Format, Box<dyn std::error::Error + Send + Sync>> {
    match format {
        DiskFormat::Qcow2 => Ok(Format::Qcow2),
        DiskFormat::Raw => Ok(Format::Raw),
        DiskFormat::Ovfms => Err("the format ovfms is described nowhere and not supported".into()),
    }
}

fn disk_limits(task: &LayerTask) -> layer::Limits {
    let limits = &task.limits;
    layer::Limits {
        max_virtual_bytes: limits.disk_virtual,
        max_data_bytes: limits.layer_data,
        max_ratio: limits.layer_ratio,
    }
}

/// Puts a stream into the scratch file, since a qcow2 is read by offset.
fn spool(from: &mut dyn Read, mut to: &File, size: Option<u64>, tell: &mut Teller<'_>) -> io::Result<()> {
    let mut buffer = vec![0_u8; 256 << 10];
    let mut done = 0_u64;
    loop {
        let n = match from.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(n) => n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
            Err(e) => return Err(e),
        };
        to.write_all(buffer.get(..n).unwrap_or_default())?;
        done = done.saturating_add(n as u64);
        // The copy is the first half of the work.
        tell.progress(done / 2, size.unwrap_or(0));
    }
}

/// Sends progress lines, not too many. If the parent is gone, the next one ends the worker.
pub(super) struct Teller<'a> {
    socket: &'a UnixStream,
    last: u64,
}

impl Teller<'_> {
    pub(super) fn progress(&mut self, done: u64, total: u64) {
        if done.abs_diff(self.last) < STEP && done != total {
            return;
        }
        self.last = done;
        if wire::write(&mut self.socket, &Reply::Progress(Progress { done, total })).is_err() {
            std::process::exit(1);
        }
    }
}
