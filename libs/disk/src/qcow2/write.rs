//! Writing a qcow2 image front to back.
//!
//! ```text
//!  cluster:  0        1..        ..        ..          ..          ..  file_size
//!          [header][refcount  ][refcount ][L1 table ][L2 tables ][data clusters, in guest order]
//!                   table       blocks
//! ```
//! What is data and what is not is known from the maps before the first byte, so nothing is ever patched up later.

use std::io::Write;

use super::{COPIED, MAGIC, ZERO};
use crate::{Error, Result, Stack, State};

const CLUSTER_BITS: u32 = 16;
const CLUSTER: u64 = 1 << CLUSTER_BITS;
/// Entries of an L2 table of one cluster.
const L2_ENTRIES: u64 = CLUSTER / 8;
/// Refcounts of 16 bits in a block of one cluster.
const REFCOUNTS: u64 = CLUSTER / 2;
/// The most clusters that are copied at once.
const BATCH: u64 = 16;

/// Neighbouring guest clusters of one kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Run {
    first: u64,
    count: u64,
    zero: bool,
}

/// The lay-out of a qcow2 v3 image (64 KiB clusters, no backing file name) before its first byte is written, so that it
/// can be streamed into a tar whose header wants the length.
#[derive(Debug)]
pub struct Plan<'a> {
    stack: &'a Stack,
    size: u64,
    runs: Vec<Run>,
    reftable_clusters: u64,
    refblock_clusters: u64,
    l1_clusters: u64,
    l2_tables: u64,
    data_clusters: u64,
}

impl<'a> Plan<'a> {
    /// What the stack's tops (frozen and writable) add to its layers. The stack must not be written meanwhile: open it
    /// read-only, or from frozen tops alone.
    ///
    /// # Errors
    /// A top's map cannot be read.
    pub fn diff(stack: &'a Stack) -> Result<Plan<'a>> {
        let size = stack.size();
        let runs = stack.with_view(|view| find_runs(size, |pos, end| view.top_run(pos, end)))?;
        let data_clusters = runs.iter().filter(|r| !r.zero).map(|r| r.count).sum();
        let mut l2_tables = 0;
        let mut next = 0;
        for run in &runs {
            let (first, last) = (run.first / L2_ENTRIES, (run.first + run.count - 1) / L2_ENTRIES);
            l2_tables += (last + 1).saturating_sub(first.max(next));
            next = last + 1;
        }
        let l1_clusters = (size.div_ceil(CLUSTER * L2_ENTRIES) * 8).div_ceil(CLUSTER).max(1);
        let mut plan = Plan {
            stack,
            size,
            runs,
            reftable_clusters: 1,
            refblock_clusters: 1,
            l1_clusters,
            l2_tables,
            data_clusters,
        };
        // The blocks count themselves too; each round only adds, and two or three suffice.
        loop {
            let blocks = plan.clusters().div_ceil(REFCOUNTS);
            let table = (blocks * 8).div_ceil(CLUSTER);
            if (blocks, table) == (plan.refblock_clusters, plan.reftable_clusters) {
                return Ok(plan);
            }
            (plan.refblock_clusters, plan.reftable_clusters) = (blocks, table);
        }
    }

    fn clusters(&self) -> u64 {
        self.data_start() + self.data_clusters
    }

    fn l1_start(&self) -> u64 {
        1 + self.reftable_clusters + self.refblock_clusters
    }

    fn l2_start(&self) -> u64 {
        self.l1_start() + self.l1_clusters
    }

    fn data_start(&self) -> u64 {
        self.l2_start() + self.l2_tables
    }

    /// The length of the image file in bytes.
    #[must_use]
    pub fn file_size(&self) -> u64 {
        self.clusters() * CLUSTER
    }

    /// The disk's size in bytes.
    #[must_use]
    pub fn virtual_size(&self) -> u64 {
        self.size
    }

    /// The data that the image holds, in bytes, whole clusters.
    #[must_use]
    pub fn data_bytes(&self) -> u64 {
        self.data_clusters * CLUSTER
    }

    /// Writes the image, front to back, without seeking.
    ///
    /// # Errors
    /// A file of the stack cannot be read, or the sink not be written.
    pub fn write_to<W: Write + ?Sized>(&self, sink: &mut W) -> Result<()> {
        let mut out = Out { sink, cluster: Vec::with_capacity(CLUSTER as usize) };
        out.words(1, self.header())?;
        let first_block = 1 + self.reftable_clusters;
        let blocks = (0..self.refblock_clusters).map(|i| (first_block + i) * CLUSTER);
        out.words(self.reftable_clusters, blocks)?;
        self.write_refcounts(&mut out)?;
        let l2_start = self.l2_start();
        out.words(self.l1_clusters, self.l1(l2_start))?;
        self.write_l2(&mut out)?;
        self.write_data(&mut out)
    }

    /// The header's fields as 64-bit words.
    fn header(&self) -> impl Iterator<Item = u64> {
        let two = |high: u64, low: u64| high << 32 | low;
        let l1_entries = self.size.div_ceil(CLUSTER * L2_ENTRIES);
        [
            two(u64::from(MAGIC), 3),
            0,                               // backing file offset
            two(0, u64::from(CLUSTER_BITS)), // backing file name's length, cluster size
            self.size,
            two(0, l1_entries), // no encryption
            self.l1_start() * CLUSTER,
            CLUSTER,                        // refcount table
            two(self.reftable_clusters, 0), // no internal snapshots
            0,
            0,           // incompatible features
            0,           // compatible features
            0,           // autoclear features
            two(4, 104), // refcounts of 2^4 bits; length of this header
        ]
        .into_iter()
    }

    fn write_refcounts<W: Write + ?Sized>(&self, out: &mut Out<'_, W>) -> Result<()> {
        let mut left = self.clusters();
        for _ in 0..self.refblock_clusters {
            let ones = left.min(REFCOUNTS);
            left -= ones;
            for i in 0..REFCOUNTS {
                out.cluster.extend_from_slice(&u16::from(i < ones).to_be_bytes());
            }
            out.emit()?;
        }
        Ok(())
    }

    /// The L1 table: each L2 table that some run needs gets the next cluster.
    fn l1(&self, l2_start: u64) -> impl Iterator<Item = u64> + '_ {
        let entries = self.size.div_ceil(CLUSTER * L2_ENTRIES);
        let mut runs = self.runs.iter().peekable();
        let mut used = 0;
        (0..entries).map(move |i| {
            while runs.next_if(|r| r.first + r.count <= i * L2_ENTRIES).is_some() {}
            if runs.peek().is_none_or(|r| r.first >= (i + 1) * L2_ENTRIES) {
                return 0;
            }
            used += 1;
            ((l2_start + used - 1) * CLUSTER) | COPIED
        })
    }

    fn write_l2<W: Write + ?Sized>(&self, out: &mut Out<'_, W>) -> Result<()> {
        let mut host = self.data_start();
        let mut table: Option<u64> = None;
        let mut filled = 0;
        for run in &self.runs {
            for cluster in run.first..run.first + run.count {
                let (index, slot) = (cluster / L2_ENTRIES, cluster % L2_ENTRIES);
                if table != Some(index) {
                    if table.is_some() {
                        out.emit()?;
                    }
                    (table, filled) = (Some(index), 0);
                }
                out.cluster.resize((slot * 8) as usize, 0);
                let entry = if run.zero { ZERO } else { (host * CLUSTER) | COPIED };
                host += u64::from(!run.zero);
                out.cluster.extend_from_slice(&entry.to_be_bytes());
                filled += 1;
            }
        }
        if filled > 0 {
            out.emit()?;
        }
        Ok(())
    }

    fn write_data<W: Write + ?Sized>(&self, out: &mut Out<'_, W>) -> Result<()> {
        let mut buffer = Vec::new();
        for run in self.runs.iter().filter(|r| !r.zero) {
            let mut done = 0;
            while done < run.count {
                let count = (run.count - done).min(BATCH);
                let start = (run.first + done) * CLUSTER;
                let len = (count * CLUSTER).min(self.size.saturating_sub(start));
                buffer.clear();
                buffer.resize((count * CLUSTER) as usize, 0);
                let inside = buffer.get_mut(..len as usize).unwrap_or_default();
                self.stack.with_view(|view| view.read_slice(start, inside))?;
                out.raw(&buffer)?;
                done += count;
            }
        }
        Ok(())
    }
}

/// Cuts the disk into runs of clusters. A cluster that is data in part is data, and so is one that is part zeros, part
/// absent: its bytes come from the whole stack.
fn find_runs(size: u64, state_of: impl Fn(u64, u64) -> Result<(State, u64)>) -> Result<Vec<Run>> {
    let mut runs: Vec<Run> = Vec::new();
    let mut at = 0;
    while at < size {
        let (state, end) = state_of(at, size)?;
        let whole = if end == size { end.div_ceil(CLUSTER) } else { end / CLUSTER };
        let first = at / CLUSTER;
        let (count, zero) = if whole > first {
            (whole - first, (state != State::Data).then_some(state))
        } else {
            // The cluster holds more than one state.
            let cluster_end = ((first + 1) * CLUSTER).min(size);
            let (mut all, mut pos) = (Some(state), end);
            while pos < cluster_end {
                let (other, stop) = state_of(pos, cluster_end)?;
                all = all.filter(|s| *s == other);
                pos = stop;
            }
            (1, all.filter(|s| *s != State::Data))
        };
        at = ((first + count) * CLUSTER).min(size);
        if zero == Some(State::Absent) {
            continue;
        }
        let zero = zero.is_some();
        match runs.last_mut() {
            Some(last) if last.zero == zero && last.first + last.count == first => last.count += count,
            _ => runs.push(Run { first, count, zero }),
        }
    }
    Ok(runs)
}

/// The sink, with the cluster that is being filled.
struct Out<'a, W: Write + ?Sized> {
    sink: &'a mut W,
    cluster: Vec<u8>,
}

impl<W: Write + ?Sized> Out<'_, W> {
    /// Writes `clusters` clusters of big-endian words, filled up with zeros.
    fn words(&mut self, clusters: u64, words: impl Iterator<Item = u64>) -> Result<()> {
        let mut emitted = 0;
        for word in words {
            self.cluster.extend_from_slice(&word.to_be_bytes());
            if self.cluster.len() as u64 == CLUSTER {
                self.emit()?;
                emitted += 1;
            }
        }
        for _ in emitted..clusters {
            self.emit()?;
        }
        Ok(())
    }

    /// Writes the cluster, filled up with zeros, and begins the next.
    fn emit(&mut self) -> Result<()> {
        self.cluster.resize(CLUSTER as usize, 0);
        self.sink.write_all(&self.cluster).map_err(Error::io("write the qcow2 image"))?;
        self.cluster.clear();
        Ok(())
    }

    fn raw(&mut self, bytes: &[u8]) -> Result<()> {
        self.sink.write_all(bytes).map_err(Error::io("write the qcow2 image"))
    }
}
