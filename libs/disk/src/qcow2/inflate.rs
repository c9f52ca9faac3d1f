//! Decompression of single clusters into a buffer of exactly one cluster.

use flate2::{Decompress, FlushDecompress, Status};
use zstd::{
    stream::raw::{Decoder, InBuffer, Operation, OutBuffer},
    zstd_safe::DParameter,
};

use super::header::Compression;
use crate::{Error, Result};

/// The largest window that a zstd frame may ask for, as a power of two: 16 MiB, eight times the largest cluster.
const MAX_WINDOW_LOG: u32 = 24;

/// A decompressor that is made once for a layer.
pub(super) enum Inflater {
    Zlib(Decompress),
    Zstd(Box<Decoder<'static>>),
}

impl Inflater {
    pub fn new(kind: Compression) -> Result<Inflater> {
        Ok(match kind {
            Compression::Zlib => Inflater::Zlib(Decompress::new(false)),
            Compression::Zstd => {
                let set_up = || {
                    let mut decoder = Decoder::new()?;
                    decoder.set_parameter(DParameter::WindowLogMax(MAX_WINDOW_LOG))?;
                    Ok(decoder)
                };
                Inflater::Zstd(Box::new(set_up().map_err(Error::io("set up the zstd decoder"))?))
            }
        })
    }

    /// Fills `output` from `input`, whose tail may be padding; whether it could be filled exactly.
    pub fn inflate(&mut self, input: &[u8], output: &mut [u8]) -> bool {
        match self {
            Inflater::Zlib(decoder) => inflate_zlib(decoder, input, output),
            Inflater::Zstd(decoder) => decoder.reinit().is_ok() && inflate_zstd(decoder, input, output),
        }
    }
}

fn inflate_zlib(decoder: &mut Decompress, input: &[u8], output: &mut [u8]) -> bool {
    decoder.reset(false);
    loop {
        let (used, made) = (decoder.total_in() as usize, decoder.total_out() as usize);
        if made >= output.len() {
            return true;
        }
        let (Some(rest), Some(space)) = (input.get(used..), output.get_mut(made..)) else {
            return false;
        };
        let status = decoder.decompress(rest, space, FlushDecompress::Finish);
        let moved = decoder.total_in() as usize > used || decoder.total_out() as usize > made;
        match status {
            Ok(Status::StreamEnd) => return decoder.total_out() as usize == output.len(),
            Ok(_) if moved => {}
            _ => return false,
        }
    }
}

fn inflate_zstd(decoder: &mut Decoder<'static>, input: &[u8], output: &mut [u8]) -> bool {
    let size = output.len();
    let mut from = InBuffer::around(input);
    let mut to = OutBuffer::around(output);
    while to.pos() < size {
        let before = (from.pos(), to.pos());
        match decoder.run(&mut from, &mut to) {
            Ok(_) if (from.pos(), to.pos()) != before => {}
            _ => return false,
        }
    }
    true
}
