//! Sets of chunks, shared by all threads that take a snapshot.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

const BITS: u64 = u64::BITS as u64;

/// A set of chunk numbers below a fixed length.
#[derive(Debug)]
pub(super) struct ChunkSet {
    words: Box<[AtomicU64]>,
    len: u64,
}

impl ChunkSet {
    /// An empty set for chunks 0 to `len`.
    pub(super) fn new(len: u64) -> Self {
        Self { words: (0..len.div_ceil(BITS)).map(|_| AtomicU64::new(0)).collect(), len }
    }

    /// How many chunks there may be.
    pub(super) fn len(&self) -> u64 {
        self.len
    }

    fn word(&self, chunk: u64) -> Option<(&AtomicU64, u64)> {
        let word = self.words.get(usize::try_from(chunk / BITS).ok()?)?;
        (chunk < self.len).then_some((word, 1 << (chunk % BITS)))
    }

    /// Adds `chunk`; one that cannot be is left out.
    pub(super) fn insert(&self, chunk: u64) {
        if let Some((word, bit)) = self.word(chunk) {
            word.fetch_or(bit, Ordering::SeqCst);
        }
    }

    /// Adds all chunks of `range`.
    pub(super) fn insert_range(&self, range: Range<u64>) {
        range.for_each(|chunk| self.insert(chunk));
    }

    /// Takes `chunk` out; `false` if it was not in.
    pub(super) fn remove(&self, chunk: u64) -> bool {
        self.word(chunk).is_some_and(|(word, bit)| word.fetch_and(!bit, Ordering::SeqCst) & bit != 0)
    }

    /// Whether `chunk` is in.
    #[cfg(test)]
    pub(super) fn contains(&self, chunk: u64) -> bool {
        self.word(chunk).is_some_and(|(word, bit)| word.load(Ordering::SeqCst) & bit != 0)
    }

    /// How many chunks are in.
    pub(super) fn count(&self) -> u64 {
        self.words.iter().map(|word| u64::from(word.load(Ordering::SeqCst).count_ones())).sum()
    }

    /// The first chunk from `from` on that is in.
    pub(super) fn next(&self, from: u64) -> Option<u64> {
        let mut index = usize::try_from(from / BITS).ok()?;
        let mut mask = u64::MAX << (from % BITS);
        loop {
            let bits = self.words.get(index)?.load(Ordering::SeqCst) & mask;
            if bits != 0 {
                return Some(index as u64 * BITS + u64::from(bits.trailing_zeros()));
            }
            index += 1;
            mask = u64::MAX;
        }
    }

    /// The chunks that are in as runs; runs that are no more than `gap` chunks apart become one.
    pub(super) fn runs(&self, gap: u64) -> Vec<Range<u64>> {
        let mut runs: Vec<Range<u64>> = Vec::new();
        let mut from = 0;
        while let Some(chunk) = self.next(from) {
            match runs.last_mut() {
                Some(run) if chunk <= run.end.saturating_add(gap) => run.end = chunk + 1,
                _ => runs.push(chunk..chunk + 1),
            }
            from = chunk + 1;
        }
        runs
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(chunks: &[u64]) -> ChunkSet {
        let set = ChunkSet::new(200);
        chunks.iter().for_each(|chunk| set.insert(*chunk));
        set
    }

    #[test]
    fn what_was_inserted_is_in_until_it_is_removed() {
        let set = set(&[0, 63, 64, 199, 200, u64::MAX]);
        assert_eq!(set.count(), 4, "what lies beyond the end is left out");
        assert!(set.contains(63) && !set.contains(65) && !set.contains(200));
        assert!(set.remove(64) && !set.remove(64));
        assert_eq!((set.next(1), set.next(64), set.next(199), set.next(200)), (Some(63), Some(199), Some(199), None));
    }

    #[test]
    fn runs_join_what_lies_close_together() {
        let set = set(&[1, 2, 5, 62, 63, 64, 65, 199]);
        assert_eq!(set.runs(0), [1..3, 5..6, 62..66, 199..200]);
        assert_eq!(set.runs(2), [1..6, 62..66, 199..200]);
        assert!(ChunkSet::new(10).runs(5).is_empty());
    }
}
