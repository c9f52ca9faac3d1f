//! When the rounds of copying end and the instant comes: pure decisions.
//!
//! ```text
//!  round 0: everything ─> what was written meanwhile ─> … ─> little enough, or no use ─> instant
//! ```
//! A round copies what the guest wrote during the one before. A guest that writes more slowly than it is copied leaves
//! less each time. What is left at the instant is held back by the barrier, where there is one: then there may be much of
//! it, and a guest that never leaves less costs a few rounds and no more. Without the barrier what is left is copied while
//! the guest stands, so more rounds are worth their while.

/// What a round's end means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Next {
    /// Copy again.
    Round,
    /// The instant.
    Instant,
}

/// When it is enough.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    /// So few chunks are left that the instant may come.
    enough: u64,
    /// The most rounds.
    rounds: u32,
    /// How many rounds in a row may fail to leave at most three quarters of the one before.
    patience: u32,
}

impl Limits {
    /// Writers are held back after the instant.
    pub(super) const BARRIER: Self = Self { enough: 128, rounds: 8, patience: 1 };
    /// What is left is copied while the guest stands: 2 MiB take about 0.5 ms, and on a busy host several times that.
    pub(super) const STANDING: Self = Self { enough: 32, rounds: 40, patience: 4 };
}

/// The rounds of one snapshot.
#[derive(Debug)]
pub(super) struct Plan {
    limits: Limits,
    rounds: u32,
    before: u64,
    stuck: u32,
}

impl Plan {
    /// Before the first round, which copies `all` chunks.
    pub(super) fn new(limits: Limits, all: u64) -> Self {
        Self { limits, rounds: 0, before: all, stuck: 0 }
    }

    /// Rounds so far.
    pub(super) fn rounds(&self) -> u32 {
        self.rounds
    }

    /// A round has ended, and `left` chunks were written meanwhile.
    pub(super) fn round_ended(&mut self, left: u64) -> Next {
        self.rounds += 1;
        let shrinks = left <= self.before / 4 * 3;
        self.stuck = if shrinks { 0 } else { self.stuck + 1 };
        self.before = left;
        if left <= self.limits.enough || self.rounds >= self.limits.rounds || self.stuck > self.limits.patience {
            Next::Instant
        } else {
            Next::Round
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Plays rounds in which the guest writes `ratio` percent of what is copied, and at least `floor` chunks.
    fn play(limits: Limits, all: u64, ratio: u64, floor: u64) -> (u32, u64) {
        let (mut plan, mut left) = (Plan::new(limits, all), all);
        loop {
            left = (left * ratio / 100).max(floor).min(all);
            if plan.round_ended(left) == Next::Instant {
                return (plan.rounds(), left);
            }
        }
    }

    #[test]
    fn idle_guest_takes_one_round() {
        assert_eq!(play(Limits::BARRIER, 100_000, 0, 0), (1, 0));
        assert_eq!(play(Limits::STANDING, 100_000, 0, 0), (1, 0));
    }

    #[test]
    fn slow_writer_is_copied_until_little_is_left() {
        let (rounds, left) = play(Limits::STANDING, 100_000, 30, 0);
        assert!(rounds <= 8 && left <= Limits::STANDING.enough, "{rounds} {left}");
    }

    #[test]
    fn guest_that_writes_as_fast_as_it_is_copied_costs_few_rounds() {
        assert_eq!(play(Limits::BARRIER, 100_000, 100, 0), (2, 100_000));
        assert_eq!(play(Limits::STANDING, 100_000, 100, 0), (5, 100_000));
    }

    #[test]
    fn small_machine_that_writes_everything_comes_to_its_instant_at_once() {
        assert_eq!(play(Limits::BARRIER, 100, 100, 0), (1, 100));
    }

    proptest! {
        #[test]
        fn rounds_are_bounded_whatever_the_guest_does(lefts in proptest::collection::vec(0..1u64 << 24, 50)) {
            for limits in [Limits::BARRIER, Limits::STANDING] {
                let mut plan = Plan::new(limits, 1 << 24);
                let ended = lefts.iter().position(|left| plan.round_ended(*left) == Next::Instant);
                prop_assert!(ended.is_some_and(|at| at < limits.rounds as usize));
            }
        }
    }
}
