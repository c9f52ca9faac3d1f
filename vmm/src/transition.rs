//! What a machine may be asked to do in which state: a pure table.
//!
//! ```text
//!                 Run            Pause
//!   Configured ────────> Running ─────> Paused        any ──guest ends──> Exited
//!                           ^  Resume     │
//!                           └─────────────┘
//! ```

use ovms_proto::control::MachineState;
use thiserror::Error;

/// What is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Input {
    /// Start the guest.
    Run,
    /// Stop the processors.
    Pause,
    /// Let them go on.
    Resume,
    /// Talk to the guest: power button, balloon.
    Tell,
    /// Set what the guest finds when it looks, now or once it runs: console size.
    Set,
    /// The guest is gone.
    GuestGone,
}

/// What the owner has to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Nothing changes.
    Nothing,
    /// Open the gate.
    Open,
    /// Close the gate, stop the devices.
    Close,
}

/// Why something is not done.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum Refused {
    /// `Run` a second time.
    #[error("the machine has been started before")]
    Started,
    /// `Resume` and the like before `Run`.
    #[error("the machine has not been started")]
    NotStarted,
    /// `Pause` when `Resume` came before it was done.
    #[error("the machine was told to go on before it stood still")]
    GoesOn,
    /// Anything after the end.
    #[error("the guest is gone")]
    Gone,
}

/// The state that follows, and what has to be done for it.
///
/// # Errors
/// [`Refused`]; the state is then unchanged.
pub fn apply(state: MachineState, input: Input) -> Result<(MachineState, Action), Refused> {
    use MachineState::{Configured, Exited, Paused, Running};
    match (state, input) {
        (_, Input::GuestGone) => Ok((Exited, Action::Close)),
        (Exited, _) => Err(Refused::Gone),
        (Configured, Input::Run) => Ok((Running, Action::Open)),
        (Running | Paused, Input::Run) => Err(Refused::Started),
        (Running, Input::Pause) => Ok((Paused, Action::Close)),
        (Configured | Paused, Input::Pause) => Ok((state, Action::Nothing)),
        (Paused, Input::Resume) => Ok((Running, Action::Open)),
        (Running, Input::Resume) => Ok((Running, Action::Nothing)),
        (Configured, Input::Resume | Input::Tell) => Err(Refused::NotStarted),
        (Running | Paused, Input::Tell) => Ok((state, Action::Nothing)),
        (Configured | Running | Paused, Input::Set) => Ok((state, Action::Nothing)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn inputs() -> impl Strategy<Value = Vec<Input>> {
        let all = [Input::Run, Input::Pause, Input::Resume, Input::Tell, Input::Set, Input::GuestGone];
        proptest::collection::vec(proptest::sample::select(all.to_vec()), 0..40)
    }

    proptest! {
        #[test]
        fn the_gate_is_open_exactly_while_running(inputs in inputs()) {
            let (mut state, mut open, mut started) = (MachineState::Configured, false, false);
            for input in inputs {
                let Ok((next, action)) = apply(state, input) else { continue };
                match action {
                    Action::Nothing => prop_assert_eq!(state, next),
                    Action::Open => { prop_assert!(!open); open = true; }
                    Action::Close => open = false,
                }
                if input == Input::Run {
                    prop_assert!(!started, "started twice");
                    started = true;
                }
                prop_assert_eq!(next == MachineState::Running, open);
                prop_assert!(started || matches!(next, MachineState::Configured | MachineState::Exited));
                prop_assert!(state != MachineState::Exited || next == MachineState::Exited);
                state = next;
            }
        }
    }

    #[test]
    fn after_the_end_everything_is_refused() {
        for input in [Input::Run, Input::Pause, Input::Resume, Input::Tell, Input::Set] {
            assert_eq!(apply(MachineState::Exited, input), Err(Refused::Gone));
        }
    }

    #[test]
    fn before_the_start_only_what_the_guest_finds_later_can_be_set() {
        let before = MachineState::Configured;
        assert_eq!(apply(before, Input::Set), Ok((before, Action::Nothing)));
        assert_eq!(apply(before, Input::Tell), Err(Refused::NotStarted));
    }
}
