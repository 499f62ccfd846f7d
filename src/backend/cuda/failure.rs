//! What goes wrong on a device, so that a caller can tell it apart; and how long the host waits for one.

use std::fmt;
use std::hint::spin_loop;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow};
use cudarc::driver::result::DriverError;
use cudarc::driver::sys::{self, CUresult as Code};

use crate::backend::{DeviceLost, Interrupted};

/// A launch whose blocks the device will not hold at once.
#[derive(Debug)]
pub(super) struct Refused(String);

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Refused {}

/// The error of a driver call: [`DeviceLost`], [`Refused`], or one that may be gone the next time.
pub(super) fn failed(what: &str, error: DriverError) -> anyhow::Error {
    // SAFETY: only tries to open the library, which knows the texts.
    let text = unsafe { sys::is_culib_present() }.then(|| error.error_string().ok()).flatten();
    let text = text.map_or_else(|| format!("{:?}", error.0), |s| s.to_string_lossy().into_owned());
    let said = format!("cuda: {what}: {text}");
    match error.0 {
        // What a trap gives, which is how a wait ends that lasts too long (`patience.cuh`).
        Code::CUDA_ERROR_LAUNCH_FAILED | Code::CUDA_ERROR_ILLEGAL_INSTRUCTION => {
            DeviceLost(format!("{said} (so end blocks that wait for each other for seconds)")).into()
        }
        Code::CUDA_ERROR_ILLEGAL_ADDRESS
        | Code::CUDA_ERROR_MISALIGNED_ADDRESS
        | Code::CUDA_ERROR_INVALID_ADDRESS_SPACE
        | Code::CUDA_ERROR_INVALID_PC
        | Code::CUDA_ERROR_HARDWARE_STACK_ERROR
        | Code::CUDA_ERROR_ASSERT
        | Code::CUDA_ERROR_LAUNCH_TIMEOUT
        | Code::CUDA_ERROR_ECC_UNCORRECTABLE
        | Code::CUDA_ERROR_NVLINK_UNCORRECTABLE
        | Code::CUDA_ERROR_CONTEXT_IS_DESTROYED
        | Code::CUDA_ERROR_MPS_CLIENT_TERMINATED
        | Code::CUDA_ERROR_UNKNOWN => DeviceLost(said).into(),
        Code::CUDA_ERROR_COOPERATIVE_LAUNCH_TOO_LARGE
        | Code::CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES
        | Code::CUDA_ERROR_NOT_SUPPORTED => Refused(said).into(),
        _ => anyhow!(said),
    }
}

/// How long a wait goes on before it heeds an interruption: whoever waits for less looks for one itself, between tokens.
const GRACE: Duration = Duration::from_millis(50);

/// How long a wait keeps its core busy; after that it looks from time to time.
const BUSY: Duration = Duration::from_millis(100);

/// One wait of the host for a device.
pub(super) struct Waiting {
    since: Instant,
    most: Duration,
    /// Nothing has answered for so long that an interruption is heeded at once.
    impatient: bool,
    interrupt: Option<&'static AtomicBool>,
}

impl Waiting {
    /// At most `most`, or until `interrupt` is true.
    pub(super) fn new(most: Duration, interrupt: Option<&'static AtomicBool>, impatient: bool) -> Self {
        Self { since: Instant::now(), most, impatient, interrupt }
    }

    /// The device has done something: it gets as much time again.
    pub(super) fn restart(&mut self) {
        self.since = Instant::now();
    }

    /// Lets some time pass.
    ///
    /// # Errors
    /// [`Interrupted`]; [`DeviceLost`] when the time is over.
    pub(super) fn pause(&self) -> Result<()> {
        let waited = self.since.elapsed();
        let heeds = self.impatient || waited > GRACE;
        if heeds && self.interrupt.is_some_and(|flag| flag.load(Ordering::Relaxed)) {
            return Err(Interrupted.into());
        }
        if waited > self.most {
            let seconds = self.most.as_secs();
            return Err(DeviceLost(format!("cuda: the device has not answered for {seconds} s")).into());
        }
        if waited < BUSY {
            spin_loop()
        } else {
            thread::sleep(Duration::from_micros(50))
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lost_device_a_refused_launch_and_other_errors_are_told_apart() {
        let lost = failed("a kernel failed", DriverError(Code::CUDA_ERROR_LAUNCH_FAILED)).context("layer 3");
        assert!(lost.is::<DeviceLost>());
        let text = format!("{lost:#}");
        assert!(text.starts_with("layer 3: cuda: a kernel failed: ") && text.contains("start it again"), "{text}");
        assert!(failed("", DriverError(Code::CUDA_ERROR_ILLEGAL_ADDRESS)).is::<DeviceLost>());
        let refused = failed("launching", DriverError(Code::CUDA_ERROR_COOPERATIVE_LAUNCH_TOO_LARGE));
        assert!(refused.is::<Refused>() && !refused.is::<DeviceLost>());
        let other = failed("memory", DriverError(Code::CUDA_ERROR_OUT_OF_MEMORY));
        assert!(!other.is::<Refused>() && !other.is::<DeviceLost>());
    }

    /// Until `wait` fails, at most a second.
    fn wait(waiting: &Waiting) -> (anyhow::Error, Duration) {
        let start = Instant::now();
        loop {
            if let Err(error) = waiting.pause() {
                return (error, start.elapsed());
            }
            assert!(start.elapsed() < Duration::from_secs(1), "it waits on");
        }
    }

    #[test]
    fn waits_end_by_themselves() {
        let most = Duration::from_millis(150);
        let (error, took) = wait(&Waiting::new(most, None, false));
        assert!(error.is::<DeviceLost>() && took >= most, "{error:#} after {took:?}");
    }

    #[test]
    fn waits_end_when_interrupted() {
        static FLAG: AtomicBool = AtomicBool::new(false);
        let waiting = Waiting::new(Duration::from_secs(60), Some(&FLAG), false);
        waiting.pause().unwrap();
        FLAG.store(true, Ordering::Relaxed);
        let (error, took) = wait(&waiting);
        assert!(error.is::<Interrupted>() && took < GRACE * 4, "{error:#} after {took:?}");
        assert!(Waiting::new(Duration::from_secs(60), Some(&FLAG), true).pause().is_err());
    }
}
