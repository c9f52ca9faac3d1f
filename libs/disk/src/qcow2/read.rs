//! Taking a qcow2 layer apart: one pass over its tables in guest order.

#![cfg_attr(not(test), deny(clippy::arithmetic_side_effects))]

use super::{be_u64, header::Header, inflate::Inflater, COMPRESSED, OFFSET_MASK, SUBCLUSTERS, ZERO};
use crate::{
    layer::{Limits, Sink},
    Error, LayerMap, ReadAt, Result, State, SECTOR,
};

/// The most bytes that are copied at once.
const RUN: u64 = 1 << 20;

/// Converts a layer; see [`crate::layer::convert`].
pub(crate) fn convert<S: ReadAt + ?Sized>(source: &S, limits: &Limits, sink: Sink<'_>) -> Result<LayerMap> {
    let header = Header::read(source, limits)?;
    let l2_tables = read_l1(source, &header)?;
    let mut sorted: Vec<u64> = l2_tables.iter().copied().filter(|offset| *offset != 0).collect();
    sorted.sort_unstable();
    if let Some(twice) = sorted.windows(2).find_map(|w| (w.first() == w.last()).then(|| w.first().copied())) {
        let what = format!("the L2 table at {} is used twice", twice.unwrap_or_default());
        return Err(Error::corrupt(what));
    }
    let inflater = Inflater::new(header.compression)?;
    let mut reader = Reader { source, header, sorted, sink, inflater, run: Run::default(), buffer: Vec::new() };
    reader.walk(&l2_tables)?;
    reader.sink.finish(header.size)
}

/// Reads the L1 table: the offsets of the L2 tables, 0 for none, each checked.
fn read_l1<S: ReadAt + ?Sized>(source: &S, header: &Header) -> Result<Vec<u64>> {
    // Header::read has checked that these bytes are in the file and at most 32 MiB.
    let mut raw = vec![0_u8; header.l1_entries.saturating_mul(8) as usize];
    source.read_padded(&mut raw, header.l1_offset).map_err(Error::io("read the layer"))?;
    let cluster = header.cluster_size();
    raw.chunks_exact(8)
        .map(|entry| {
            let offset = be_u64(entry, 0) & OFFSET_MASK;
            let end = offset.saturating_add(cluster);
            let askew = offset.checked_rem(cluster) != Some(0) || end > header.file_size;
            if offset != 0 && (askew || header.tables.iter().any(|&(s, e)| offset < e && s < end)) {
                let what = format!("the L2 table at {offset} lies askew, outside of the file or over another table");
                return Err(Error::corrupt(what));
            }
            Ok(offset)
        })
        .collect()
}

/// Guest bytes that lie in one piece of the file.
#[derive(Debug, Default, Clone, Copy)]
struct Run {
    guest: u64,
    host: u64,
    len: u64,
}

struct Reader<'s, 'a, S: ReadAt + ?Sized> {
    source: &'s S,
    header: Header,
    /// The offsets of the L2 tables, sorted.
    sorted: Vec<u64>,
    sink: Sink<'a>,
    inflater: Inflater,
    /// Data that was seen but not copied yet, so that neighbours are copied at once.
    run: Run,
    buffer: Vec<u8>,
}

impl<S: ReadAt + ?Sized> Reader<'_, '_, S> {
    fn walk(&mut self, l2_tables: &[u64]) -> Result<()> {
        let header = self.header;
        let mut table = vec![0_u8; header.cluster_size() as usize];
        let mut guest = 0_u64;
        for &offset in l2_tables {
            let end = guest.saturating_add(header.l2_reach()).min(header.size);
            if offset == 0 {
                self.put(end, State::Absent)?;
            } else {
                self.source.read_padded(&mut table, offset).map_err(Error::io("read the layer"))?;
                self.walk_l2(&table, guest, end)?;
            }
            guest = end;
        }
        self.copy_run()
    }

    fn walk_l2(&mut self, table: &[u8], mut guest: u64, end: u64) -> Result<()> {
        for entry in table.chunks_exact(self.header.entry_size() as usize) {
            if guest >= end {
                break;
            }
            let next = guest.saturating_add(self.header.cluster_size()).min(end);
            self.cluster(be_u64(entry, 0), be_u64(entry, 8), guest, next)?;
            guest = next;
        }
        Ok(())
    }

    /// One guest cluster, from `guest` to `end`; `bitmap` is that of an extended entry.
    fn cluster(&mut self, entry: u64, bitmap: u64, guest: u64, end: u64) -> Result<()> {
        if entry & COMPRESSED != 0 {
            return self.compressed(entry, guest, end);
        }
        let host = entry & OFFSET_MASK;
        if host != 0 {
            self.check_host(host, guest)?;
        }
        if self.header.extended_l2 {
            return self.subclusters(host, bitmap, guest, end);
        }
        match (entry & ZERO != 0, host) {
            (true, _) if self.header.version < 3 => {
                Err(Error::corrupt(format!("the cluster at {guest} has a zero flag, which version 2 does not know")))
            }
            (true, _) => self.put(end, State::Zero),
            (false, 0) => self.put(end, State::Absent),
            (false, _) => self.data(guest, end, host),
        }
    }

    fn check_host(&self, host: u64, guest: u64) -> Result<()> {
        let header = &self.header;
        let over_table = header.tables.iter().any(|&(s, e)| (s..e).contains(&host));
        if host.checked_rem(header.cluster_size()) != Some(0) || host >= header.file_size {
            let what = format!("the cluster at {guest} points to {host}, which is askew or outside of the file");
            return Err(Error::corrupt(what));
        }
        if over_table || self.sorted.binary_search(&host).is_ok() {
            return Err(Error::corrupt(format!("the cluster at {guest} points to {host}, where a table lies")));
        }
        Ok(())
    }

    fn subclusters(&mut self, host: u64, bitmap: u64, guest: u64, end: u64) -> Result<()> {
        let (allocated, zero) = (bitmap as u32, (bitmap >> 32) as u32);
        if allocated & zero != 0 || (allocated != 0 && host == 0) {
            return Err(Error::corrupt(format!("the cluster at {guest} has the impossible bitmap {bitmap:#018x}")));
        }
        let size = self.header.cluster_size().checked_div(SUBCLUSTERS).unwrap_or(SECTOR);
        let (mut at, mut host) = (guest, host);
        for i in 0..32_u32 {
            if at >= end {
                break;
            }
            let next = at.saturating_add(size).min(end);
            let bit = 1_u32.wrapping_shl(i);
            match (allocated & bit != 0, zero & bit != 0) {
                (true, _) => self.data(at, next, host)?,
                (_, true) => self.put(next, State::Zero)?,
                _ => self.put(next, State::Absent)?,
            }
            (at, host) = (next, host.saturating_add(size));
        }
        Ok(())
    }

    /// Bits 0 to x-1 are the host offset, the rest up to bit 61 the number of further sectors; x = 62 - (bits - 8).
    fn compressed(&mut self, entry: u64, guest: u64, end: u64) -> Result<()> {
        self.copy_run()?;
        let shift = 70_u32.saturating_sub(self.header.cluster_bits);
        let fields = entry & (COMPRESSED.saturating_sub(1));
        let host = fields & 1_u64.wrapping_shl(shift).saturating_sub(1);
        let sectors = fields.wrapping_shr(shift).saturating_add(1);
        let length = sectors.saturating_mul(SECTOR).saturating_sub(host & (SECTOR.saturating_sub(1)));
        let cluster = self.header.cluster_size();
        // The field has as many bits as a cluster has sectors, twice: no honest writer needs more.
        if host >= self.header.file_size || length > cluster.saturating_mul(2) {
            let what = format!("the compressed cluster at {guest} points to {host}, outside of the file");
            return Err(Error::corrupt(what));
        }
        let mut packed = vec![0_u8; length as usize];
        self.source.read_padded(&mut packed, host).map_err(Error::io("read the layer"))?;
        self.buffer.resize(cluster as usize, 0);
        if !self.inflater.inflate(&packed, &mut self.buffer) {
            return Err(Error::corrupt(format!("the compressed cluster at {guest} cannot be decompressed")));
        }
        self.sink.work(cluster)?;
        let wanted = self.buffer.get(..end.saturating_sub(guest) as usize).unwrap_or_default();
        self.sink.data(guest, wanted)
    }

    /// Uncompressed data: joined to the run before if both its ends meet.
    fn data(&mut self, guest: u64, end: u64, host: u64) -> Result<()> {
        let run = self.run;
        let joins = guest == run.guest.saturating_add(run.len) && host == run.host.saturating_add(run.len);
        if run.len == 0 || !joins || run.len >= RUN {
            self.copy_run()?;
            self.run = Run { guest, host, len: 0 };
        }
        self.run.len = end.saturating_sub(self.run.guest);
        Ok(())
    }

    fn put(&mut self, end: u64, state: State) -> Result<()> {
        self.copy_run()?;
        self.sink.put(end, state)
    }

    fn copy_run(&mut self) -> Result<()> {
        let Run { mut guest, mut host, mut len } = std::mem::take(&mut self.run);
        while len > 0 {
            let part = len.min(RUN);
            self.buffer.resize(part as usize, 0);
            self.source.read_padded(&mut self.buffer, host).map_err(Error::io("read the layer"))?;
            self.sink.work(part)?;
            self.sink.data(guest, &self.buffer)?;
            guest = guest.saturating_add(part);
            host = host.saturating_add(part);
            len = len.saturating_sub(part);
        }
        Ok(())
    }
}
