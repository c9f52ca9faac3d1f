//! The header: what kind of qcow2 this is, and whether we want it.

#![cfg_attr(not(test), deny(clippy::arithmetic_side_effects))]

use super::{be_u32, be_u64, MAGIC};
use crate::{layer::Limits, tiles::MAX_SIZE, Error, ReadAt, Result, SECTOR};

/// Length of the fields of version 2, which version 3 continues.
const V2_LENGTH: u32 = 72;
/// The least header length of version 3.
const V3_LENGTH: u32 = 104;
/// QEMU's caps (block/qcow2.h): 32 MiB of L1 table, 8 MiB of refcount table, 1023 bytes of backing file name.
const MAX_L1_BYTES: u64 = 32 << 20;
const MAX_REFTABLE_BYTES: u64 = 8 << 20;
const MAX_NAME: u64 = 1023;

const INCOMPATIBLE_DIRTY: u64 = 1 << 0;
const INCOMPATIBLE_CORRUPT: u64 = 1 << 1;
const INCOMPATIBLE_DATA_FILE: u64 = 1 << 2;
const INCOMPATIBLE_COMPRESSION: u64 = 1 << 3;
const INCOMPATIBLE_EXTENDED_L2: u64 = 1 << 4;
const INCOMPATIBLE_KNOWN: u64 = 0x1f;

const EXT_END: u32 = 0;
const EXT_FEATURE_NAMES: u32 = 0x6803_f857;
const EXT_CRYPTO: u32 = 0x0537_be77;
const EXT_DATA_FILE: u32 = 0x4441_5441;

/// How compressed clusters are packed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Compression {
    Zlib,
    Zstd,
}

/// A header that passed every check.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Header {
    pub version: u32,
    pub cluster_bits: u32,
    /// Virtual size in bytes, a multiple of 512.
    pub size: u64,
    pub l1_offset: u64,
    /// L1 entries that the virtual size needs; the table may be longer.
    pub l1_entries: u64,
    /// L1 table and refcount table, as byte ranges of the file; no cluster of data may lie in them.
    pub tables: [(u64, u64); 2],
    pub extended_l2: bool,
    pub compression: Compression,
    pub file_size: u64,
}

impl Header {
    pub fn cluster_size(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// Bytes of one L2 entry.
    pub fn entry_size(&self) -> u64 {
        if self.extended_l2 {
            16
        } else {
            8
        }
    }

    /// Guest bytes that one L2 table describes. At most 2^18 entries of 2^21 bytes.
    pub fn l2_reach(&self) -> u64 {
        self.cluster_size().checked_div(self.entry_size()).unwrap_or(0).saturating_mul(self.cluster_size())
    }

    /// Reads and checks a header.
    pub fn read<S: ReadAt + ?Sized>(source: &S, limits: &Limits) -> Result<Header> {
        let read = || Error::io("read the layer");
        let file_size = source.size().map_err(read())?;
        let mut raw = [0_u8; 112];
        let there = source.read_padded(&mut raw, 0).map_err(read())?;
        if there < V2_LENGTH as usize || be_u32(&raw, 0) != MAGIC {
            return Err(Error::NotQcow2 { found: be_u32(&raw, 0) });
        }
        let version = be_u32(&raw, 4);
        if !(2..=3).contains(&version) {
            return Err(Error::Unsupported { what: format!("format version {version}") });
        }
        let cluster_bits = be_u32(&raw, 20);
        if !(9..=21).contains(&cluster_bits) {
            return Err(Error::corrupt(format!(
                "a cluster size of 2^{cluster_bits} bytes is not between 512 and 2 MiB"
            )));
        }
        let cluster_size = 1_u64 << cluster_bits;
        let (mut features, mut length, mut compression) = (0, V2_LENGTH, Compression::Zlib);
        if version == 3 {
            features = be_u64(&raw, 72);
            length = be_u32(&raw, 100);
            if there < V3_LENGTH as usize || length < V3_LENGTH || u64::from(length) > cluster_size || length % 8 != 0 {
                return Err(Error::corrupt(format!("a header of {length} bytes cannot be")));
            }
            let order = be_u32(&raw, 96);
            if order > 6 {
                return Err(Error::corrupt(format!("a refcount width of 2^{order} bits exceeds 64")));
            }
            compression = compression_of(features, if length > V3_LENGTH { raw.get(104).copied() } else { None })?;
        }
        let extensions = Extensions::read(source, length, &raw, cluster_size)?;
        refuse_features(features, &extensions, be_u32(&raw, 32))?;
        let extended_l2 = features & INCOMPATIBLE_EXTENDED_L2 != 0;
        if extended_l2 && cluster_bits < 14 {
            return Err(Error::corrupt("extended L2 entries need clusters of 16 KiB or more"));
        }
        refuse_backing(source, &raw, cluster_size)?;
        let mut header = Header {
            version,
            cluster_bits,
            size: be_u64(&raw, 24) & !SECTOR.saturating_sub(1),
            l1_offset: be_u64(&raw, 40),
            l1_entries: 0,
            tables: [(0, 0); 2],
            extended_l2,
            compression,
            file_size,
        };
        header.check_tables(&raw, limits)?;
        Ok(header)
    }

    fn check_tables(&mut self, raw: &[u8], limits: &Limits) -> Result<()> {
        let limit = limits.max_virtual_bytes.min(MAX_SIZE);
        if self.size > limit {
            return Err(Error::Limit { what: "virtual size", value: self.size, limit });
        }
        self.l1_entries = self.size.div_ceil(self.l2_reach());
        let l1_bytes = u64::from(be_u32(raw, 36)).saturating_mul(8);
        if l1_bytes > MAX_L1_BYTES {
            return Err(Error::Limit { what: "L1 table size", value: l1_bytes, limit: MAX_L1_BYTES });
        }
        if l1_bytes / 8 < self.l1_entries {
            let what = format!("an L1 table of {l1_bytes} bytes is too small for a disk of {} bytes", self.size);
            return Err(Error::corrupt(what));
        }
        let l1_end = self.l1_offset.saturating_add(l1_bytes);
        let needed_end = self.l1_offset.saturating_add(self.l1_entries.saturating_mul(8));
        if !self.l1_offset.is_multiple_of(self.cluster_size()) || needed_end > self.file_size {
            return Err(Error::corrupt(format!(
                "the L1 table at {} lies outside of the file or askew",
                self.l1_offset
            )));
        }
        let (ref_offset, ref_clusters) = (be_u64(raw, 48), u64::from(be_u32(raw, 56)));
        let ref_bytes = ref_clusters.saturating_mul(self.cluster_size());
        if ref_bytes > MAX_REFTABLE_BYTES {
            return Err(Error::Limit { what: "refcount table size", value: ref_bytes, limit: MAX_REFTABLE_BYTES });
        }
        let ref_end = ref_offset.saturating_add(ref_bytes);
        if !ref_offset.is_multiple_of(self.cluster_size()) || ref_offset > self.file_size {
            return Err(Error::corrupt(format!(
                "the refcount table at {ref_offset} lies outside of the file or askew"
            )));
        }
        let apart = self.l1_offset >= ref_end || ref_offset >= needed_end || ref_bytes == 0 || self.l1_entries == 0;
        if !apart || (self.l1_offset == 0 && self.l1_entries > 0) || (ref_offset == 0 && ref_bytes > 0) {
            return Err(Error::corrupt("header, L1 table and refcount table overlap"));
        }
        self.tables = [(self.l1_offset, l1_end), (ref_offset, ref_end)];
        Ok(())
    }
}

fn compression_of(features: u64, kind: Option<u8>) -> Result<Compression> {
    match (features & INCOMPATIBLE_COMPRESSION != 0, kind.unwrap_or(0)) {
        (false, 0) => Ok(Compression::Zlib),
        (true, 1) => Ok(Compression::Zstd),
        (_, kind @ (0 | 1)) => Err(Error::corrupt(format!("compression type {kind} contradicts the feature bit"))),
        (_, kind) => Err(Error::Unsupported { what: format!("compression type {kind}") }),
    }
}

fn refuse_features(features: u64, extensions: &Extensions, crypt_method: u32) -> Result<()> {
    if features & INCOMPATIBLE_DATA_FILE != 0 || extensions.data_file.as_ref().is_some_and(|n| !n.is_empty()) {
        return Err(Error::DataFile { name: extensions.data_file.clone().unwrap_or_default() });
    }
    if crypt_method != 0 || extensions.crypto {
        return Err(Error::Unsupported { what: "encryption".into() });
    }
    let unknown = features & !INCOMPATIBLE_KNOWN;
    if unknown != 0 {
        let bit = unknown.trailing_zeros() as u8;
        let name = extensions.incompatible_names.iter().find(|(b, _)| *b == bit).map(|(_, name)| name.as_str());
        let what = match name {
            Some(name) => format!("the incompatible feature {name:?} (bit {bit})"),
            None => format!("the unknown incompatible feature bit {bit}"),
        };
        return Err(Error::Unsupported { what });
    }
    if features & INCOMPATIBLE_CORRUPT != 0 {
        return Err(Error::corrupt("it is marked as corrupt; repair it with `qemu-img check -r all`"));
    }
    // A dirty image has stale refcounts, which a reader does not need.
    let _ = INCOMPATIBLE_DIRTY;
    Ok(())
}

fn refuse_backing<S: ReadAt + ?Sized>(source: &S, raw: &[u8], cluster_size: u64) -> Result<()> {
    let (offset, length) = (be_u64(raw, 8), u64::from(be_u32(raw, 16)));
    if offset == 0 || length == 0 {
        return Ok(());
    }
    if offset > cluster_size || length > MAX_NAME.min(cluster_size.saturating_sub(offset)) {
        return Err(Error::corrupt(format!("a backing file name of {length} bytes at {offset} cannot be")));
    }
    let mut name = vec![0_u8; length as usize];
    source.read_padded(&mut name, offset).map_err(Error::io("read the layer"))?;
    Err(Error::BackingFile { name: text(&name) })
}

/// A name out of the image, fit for a message.
fn text(bytes: &[u8]) -> String {
    let end = bytes.iter().position(|b| *b == 0).unwrap_or(bytes.len());
    String::from_utf8_lossy(bytes.get(..end.min(255)).unwrap_or_default()).into_owned()
}

/// What we want to know of the header extensions; all others are passed over.
#[derive(Debug, Default)]
struct Extensions {
    crypto: bool,
    data_file: Option<String>,
    incompatible_names: Vec<(u8, String)>,
}

impl Extensions {
    fn read<S: ReadAt + ?Sized>(source: &S, header_length: u32, raw: &[u8], cluster_size: u64) -> Result<Extensions> {
        let mut found = Extensions::default();
        let backing = be_u64(raw, 8);
        if backing > cluster_size {
            return Err(Error::corrupt(format!("a backing file name at {backing} lies outside of the header cluster")));
        }
        let end = if backing == 0 { cluster_size } else { backing };
        let mut area = vec![0_u8; end.saturating_sub(u64::from(header_length)) as usize];
        source.read_padded(&mut area, u64::from(header_length)).map_err(Error::io("read the layer"))?;
        let mut rest = area.as_slice();
        while rest.len() >= 8 {
            let (kind, length) = (be_u32(rest, 0), be_u32(rest, 4) as usize);
            if kind == EXT_END {
                break;
            }
            let body = rest.get(8..).and_then(|b| b.get(..length));
            let body = body.ok_or_else(|| Error::corrupt(format!("header extension {kind:#x} is too large")))?;
            match kind {
                EXT_CRYPTO => found.crypto = true,
                EXT_DATA_FILE => found.data_file = Some(text(body)),
                EXT_FEATURE_NAMES => found.add_names(body),
                _ => {}
            }
            rest = rest.get(8_usize.saturating_add(length.next_multiple_of(8))..).unwrap_or_default();
        }
        Ok(found)
    }

    /// Entries of 48 bytes: type (0 = incompatible), bit, 46 bytes of name.
    fn add_names(&mut self, body: &[u8]) {
        for entry in body.chunks_exact(48) {
            if let (Some(0), Some(bit), Some(name)) = (entry.first(), entry.get(1), entry.get(2..)) {
                self.incompatible_names.push((*bit, text(name)));
            }
        }
    }
}
