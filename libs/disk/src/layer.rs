//! Turning one disk layer into block-stack form, in one pass.
//!
//! The result is a sparse raw file with every byte at its guest offset, and a [`LayerMap`] that says which ranges the
//! layer defines. A qcow2 may leave ranges absent (they fall through to the layer below); a raw layer defines its whole
//! range: data, or zeros where it has holes. Data that is all zeros is not stored but marked.

use std::{
    fs::File,
    io::{self, Read},
    os::unix::fs::FileExt,
};

use crate::{map::MapBuilder, qcow2, tiles::MAX_SIZE, Error, LayerMap, ReadAt, Result, State, SECTOR};

/// Data is written, and holes are left, in units of this many bytes.
const PAGE: usize = 4096;
/// Zeros are marked in the map in units of this many bytes, so that they do not make it long.
const ZERO_UNIT: u64 = 64 << 10;
/// The data that any layer may have, however short its file is.
const FREE_DATA: u64 = 64 << 20;

/// The format of a layer, as the image's manifest or the tar member's name gives it; never guessed from content.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// qcow2, version 2 or 3.
    Qcow2,
    /// The disk's bytes as they are.
    Raw,
}

/// What a hostile layer may cost.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// The largest virtual size, in bytes.
    pub max_virtual_bytes: u64,
    /// The most bytes of data that may come out of the layer.
    pub max_data_bytes: u64,
    /// The most bytes of data for each byte of the layer file. Applies beyond the first 64 MiB of data.
    pub max_ratio: u64,
}

impl Default for Limits {
    /// 64 TiB of virtual size, 4 TiB of data, 1100 bytes for each (zlib cannot exceed 1032).
    fn default() -> Self {
        Limits { max_virtual_bytes: 64 << 40, max_data_bytes: 4 << 40, max_ratio: 1100 }
    }
}

/// What a layer's header says about it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Info {
    /// The layer's format.
    pub format: Format,
    /// The size of the disk that it describes, in bytes, a multiple of 512 (a raw file's last sector is filled up).
    pub virtual_size: u64,
    /// The length of the layer file, in bytes.
    pub file_size: u64,
}

/// Reads and checks a layer's header and nothing more: for `ovm build`, `validate` and `inspect`.
///
/// # Errors
/// Whatever would make [`convert`] refuse the layer by its header.
pub fn probe<S: ReadAt + ?Sized>(source: &S, format: Format, limits: &Limits) -> Result<Info> {
    match format {
        Format::Qcow2 => {
            let header = qcow2::Header::read(source, limits)?;
            Ok(Info { format, virtual_size: header.size, file_size: header.file_size })
        }
        Format::Raw => {
            let file_size = source.size().map_err(Error::io("read the layer"))?;
            let limit = limits.max_virtual_bytes.min(MAX_SIZE);
            let virtual_size = file_size.checked_next_multiple_of(SECTOR).unwrap_or(u64::MAX);
            if virtual_size > limit {
                return Err(Error::Limit { what: "virtual size", value: virtual_size, limit });
            }
            Ok(Info { format, virtual_size, file_size })
        }
    }
}

/// Converts a layer: writes its data to `data` (an empty file; made sparse, as long as its last data needs) and returns
/// the map. `progress(done, total)` is called from time to time with guest bytes. Syncing `data` is the caller's.
///
/// # Errors
/// The layer is refused (see [`crate::Error`]) or a file cannot be read or written; `data` is then worthless.
pub fn convert<S: ReadAt + ?Sized>(
    source: &S,
    format: Format,
    data: &File,
    limits: &Limits,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<LayerMap> {
    let info = probe(source, format, limits)?;
    let by_ratio = info.file_size.saturating_mul(limits.max_ratio).max(FREE_DATA);
    let sink = Sink {
        data,
        map: MapBuilder::default(),
        progress,
        size: info.virtual_size,
        data_end: 0,
        work: 0,
        max_work: limits.max_data_bytes.min(by_ratio),
    };
    match format {
        Format::Qcow2 => qcow2::convert(source, limits, sink),
        Format::Raw => convert_raw(source, &info, sink),
    }
}

/// Converts a raw layer that comes as a stream, such as a member of a compressed tar. Its length becomes the virtual
/// size; `size` is what the stream's header says of it, for `progress` alone.
///
/// # Errors
/// As [`convert`].
pub fn convert_stream(
    source: &mut dyn Read,
    size: Option<u64>,
    data: &File,
    limits: &Limits,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<LayerMap> {
    let limit = limits.max_virtual_bytes.min(MAX_SIZE);
    let map = MapBuilder::default();
    let mut sink =
        Sink { data, map, progress, size: size.unwrap_or(0), data_end: 0, work: 0, max_work: limits.max_data_bytes };
    let mut buffer = vec![0_u8; 1 << 20];
    let mut at = 0_u64;
    loop {
        let n = fill(source, &mut buffer).map_err(Error::io("read the layer"))?;
        // Only the last piece can be short; its last sector is filled up.
        let padded = n.next_multiple_of(SECTOR as usize);
        buffer.get_mut(n..padded).unwrap_or_default().fill(0);
        if n > 0 {
            let end = at + padded as u64;
            if end > limit {
                return Err(Error::Limit { what: "virtual size", value: end, limit });
            }
            sink.work(padded as u64)?;
            sink.data(at, buffer.get(..padded).unwrap_or_default())?;
            at = end;
        }
        if n < buffer.len() {
            return sink.finish(at);
        }
    }
}

/// Reads until the buffer is full or the stream at its end.
fn fill(source: &mut dyn Read, buffer: &mut [u8]) -> io::Result<usize> {
    let mut done = 0;
    while let Some(rest) = buffer.get_mut(done..).filter(|rest| !rest.is_empty()) {
        match source.read(rest) {
            Ok(0) => break,
            Ok(n) => done = done.saturating_add(n),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(done)
}

fn convert_raw<S: ReadAt + ?Sized>(source: &S, info: &Info, mut sink: Sink<'_>) -> Result<LayerMap> {
    let read = || Error::io("read the layer");
    let mut buffer = vec![0_u8; 1 << 20];
    let mut at = 0_u64;
    while at < info.virtual_size {
        let (start, end) = source.next_data(at).map_err(read())?.unwrap_or((info.virtual_size, info.virtual_size));
        // Holes need not begin at a sector; a few zeros more are read as data then.
        let start = (start / SECTOR * SECTOR).clamp(at, info.virtual_size);
        let end = end.checked_next_multiple_of(SECTOR).unwrap_or(u64::MAX).clamp(start, info.virtual_size);
        sink.put(start, State::Zero)?;
        at = start;
        while at < end {
            let part = (end - at).min(buffer.len() as u64);
            let bytes = buffer.get_mut(..part as usize).unwrap_or_default();
            source.read_padded(bytes, at).map_err(read())?;
            sink.work(part)?;
            sink.data(at, bytes)?;
            at += part;
        }
    }
    sink.finish(info.virtual_size)
}

/// Where a converted layer goes: data file, map, and the caps on both.
pub(crate) struct Sink<'a> {
    data: &'a File,
    map: MapBuilder,
    progress: &'a mut dyn FnMut(u64, u64),
    size: u64,
    /// Where the last data ends.
    data_end: u64,
    work: u64,
    max_work: u64,
}

impl Sink<'_> {
    /// Counts bytes that came out of the layer against the limit.
    pub fn work(&mut self, bytes: u64) -> Result<()> {
        self.work = self.work.saturating_add(bytes);
        if self.work > self.max_work {
            return Err(Error::Limit { what: "data", value: self.work, limit: self.max_work });
        }
        Ok(())
    }

    /// Appends a range without data to the map.
    pub fn put(&mut self, end: u64, state: State) -> Result<()> {
        self.map.push_to(end, state)
    }

    /// Appends data, which begins where the map ends now, at `guest`.
    pub fn data(&mut self, guest: u64, bytes: &[u8]) -> Result<()> {
        debug_assert_eq!(self.map.end(), guest);
        let (mut at, mut rest) = (guest, bytes);
        while !rest.is_empty() {
            let unit = (ZERO_UNIT - at % ZERO_UNIT).min(rest.len() as u64);
            let (head, tail) = rest.split_at(unit as usize);
            let state = if self.write_pages(at, head)? { State::Data } else { State::Zero };
            at += unit;
            if state == State::Data {
                self.data_end = at;
            }
            self.map.push_to(at, state)?;
            rest = tail;
        }
        (self.progress)(at, self.size);
        Ok(())
    }

    /// Writes the pages that are not all zeros; whether there was one.
    fn write_pages(&self, start: u64, bytes: &[u8]) -> Result<bool> {
        let (mut at, mut rest, mut any) = (start, bytes, false);
        while !rest.is_empty() {
            let zeros = rest.chunks(PAGE).take_while(|page| is_zero(page)).map(<[u8]>::len).sum();
            let after = rest.split_at(zeros).1;
            let full = after.chunks(PAGE).take_while(|page| !is_zero(page)).map(<[u8]>::len).sum();
            let (data, tail) = after.split_at(full);
            at += zeros as u64;
            self.data.write_all_at(data, at).map_err(Error::io("write the layer's data file"))?;
            any |= full > 0;
            at += full as u64;
            rest = tail;
        }
        Ok(any)
    }

    /// Ends the map. The data file gets no longer than its data, since file systems hold less than a disk may be (ext4:
    /// 16 TiB); its last pages may be a hole.
    pub fn finish(self, size: u64) -> Result<LayerMap> {
        self.data.set_len(self.data_end).map_err(Error::io("size the layer's data file"))?;
        (self.progress)(size, self.size);
        self.map.finish(size)
    }
}

/// Without an early exit, so that the compiler can use vectors.
fn is_zero(page: &[u8]) -> bool {
    page.iter().fold(0, |sum, byte| sum | byte) == 0
}
