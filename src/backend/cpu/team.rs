//! Threads that share the work of an operation.
//!
//! A token is some two hundred operations of a few microseconds each, so handing them out must take less than one. The
//! threads wait for work by looking: first without rest, after a while asleep. Work is in pieces, and whoever is free takes
//! the next one: a thread that the system keeps from running holds up no more than its piece.

use std::cell::UnsafeCell;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{JoinHandle, Thread};
use std::time::{Duration, Instant};

/// How long a thread looks for work before it sleeps: longer than what lies between two operations of a token.
const LOOKS: Duration = Duration::from_micros(200);

/// Pieces of an operation at most.
const MOST: usize = 1 << 20;

/// The caller's thread and those that help it.
#[derive(Debug)]
pub(super) struct Team {
    shared: Arc<Board>,
    threads: Vec<JoinHandle<()>>,
    /// Held while an operation runs: callers on several threads take turns.
    turn: Mutex<()>,
}

/// Where work is posted.
struct Board {
    /// Number of the operation (24 bits), how many pieces it has, and how many are taken (20 bits each).
    post: AtomicU64,
    /// Written before an operation is posted, and not again before all of its pieces are done.
    work: UnsafeCell<Option<Work>>,
    done: AtomicUsize,
    panicked: AtomicBool,
    stop: AtomicBool,
    sleepers: Mutex<Vec<Thread>>,
    asleep: AtomicUsize,
}

type Work = *const (dyn Fn(usize) + Sync);

// SAFETY: `work` is written by the one caller that holds `turn`, and read only by threads that hold a piece of it, which
// they took after it was posted and before it is done.
unsafe impl Sync for Board {}
// SAFETY: likewise; nothing in it belongs to a thread.
unsafe impl Send for Board {}

impl std::fmt::Debug for Board {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Board").finish_non_exhaustive()
    }
}

impl Board {
    /// Takes a piece of the operation that is posted, if one is left.
    fn take(&self) -> Option<usize> {
        let mut post = self.post.load(Ordering::Acquire);
        loop {
            let (pieces, taken) = (post >> 20 & (MOST as u64 - 1), post & (MOST as u64 - 1));
            if taken >= pieces {
                return None;
            }
            match self.post.compare_exchange_weak(post, post + 1, Ordering::Acquire, Ordering::Acquire) {
                Ok(_) => return Some(taken as usize),
                Err(now) => post = now,
            }
        }
    }

    /// Does pieces until none is left.
    fn help(&self) {
        while let Some(piece) = self.take() {
            // SAFETY: a piece is held, so that what was posted stays until `done` counts it.
            let work = unsafe { &*(*self.work.get()).expect("posted") };
            if std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| work(piece))).is_err() {
                self.panicked.store(true, Ordering::Relaxed);
            }
            self.done.fetch_add(1, Ordering::Release);
        }
    }

    fn serve(&self) {
        let mut idle = None;
        let mut looks = 0u32;
        while !self.stop.load(Ordering::Relaxed) {
            let before = self.done.load(Ordering::Relaxed);
            self.help();
            if self.done.load(Ordering::Relaxed) != before {
                idle = None;
            }
            std::hint::spin_loop();
            looks = looks.wrapping_add(1);
            // The clock is slower to read than the board.
            if looks.is_multiple_of(64) && idle.get_or_insert_with(Instant::now).elapsed() > LOOKS {
                self.sleep();
                idle = None;
            }
        }
    }

    /// Sleeps until something is posted.
    fn sleep(&self) {
        self.sleepers.lock().expect("no panic while it is held").push(std::thread::current());
        self.asleep.fetch_add(1, Ordering::SeqCst);
        // Whoever posts looks at `asleep` afterwards: one of the two sees the other.
        let post = self.post.load(Ordering::SeqCst);
        if post >> 20 & (MOST as u64 - 1) <= post & (MOST as u64 - 1) && !self.stop.load(Ordering::SeqCst) {
            std::thread::park();
        }
    }

    /// Wakes all who sleep.
    fn wake(&self) {
        if self.asleep.load(Ordering::SeqCst) > 0 {
            let sleepers = std::mem::take(&mut *self.sleepers.lock().expect("no panic while it is held"));
            self.asleep.fetch_sub(sleepers.len(), Ordering::SeqCst);
            sleepers.iter().for_each(Thread::unpark);
        }
    }
}

impl Team {
    /// A team of so many threads, the caller's among them.
    pub(super) fn new(threads: usize) -> Self {
        let shared = Arc::new(Board {
            post: AtomicU64::new(0),
            work: UnsafeCell::new(None),
            done: AtomicUsize::new(0),
            panicked: AtomicBool::new(false),
            stop: AtomicBool::new(false),
            sleepers: Mutex::new(Vec::new()),
            asleep: AtomicUsize::new(0),
        });
        let start = |i| {
            let board = Arc::clone(&shared);
            std::thread::Builder::new().name(format!("decdec-cpu-{i}")).spawn(move || board.serve())
        };
        // Fewer threads do the same work.
        let threads = (1..threads).map_while(|i| start(i).ok()).collect();
        Self { shared, threads, turn: Mutex::new(()) }
    }

    /// How many threads there are, the caller's among them.
    pub(super) fn size(&self) -> usize {
        self.threads.len() + 1
    }

    /// `work(piece)` for all of `0..pieces`, in any order and on any thread; returns when all are done.
    ///
    /// # Panics
    /// If `work` does.
    pub(super) fn run(&self, pieces: usize, work: &(dyn Fn(usize) + Sync)) {
        assert!(pieces < MOST, "{pieces} pieces");
        let turn = if pieces > 1 && !self.threads.is_empty() { self.turn.try_lock().ok() } else { None };
        // An operation of another caller, or of this one further up, has the team.
        let Some(_turn) = turn else { return (0..pieces).for_each(work) };
        let board = &*self.shared;
        // SAFETY: the turn is held and the operation before it is done, so nobody reads `work`. The reference is used
        // until all pieces are done, and this function returns only then.
        unsafe { *board.work.get() = Some(std::mem::transmute::<*const (dyn Fn(usize) + Sync), Work>(work)) };
        board.done.store(0, Ordering::Relaxed);
        let number = (board.post.load(Ordering::Relaxed) >> 40).wrapping_add(1) & 0xff_ffff;
        board.post.store(number << 40 | (pieces as u64) << 20, Ordering::SeqCst);
        board.wake();
        board.help();
        let mut looks = 0u32;
        while board.done.load(Ordering::Acquire) < pieces {
            std::hint::spin_loop();
            looks += 1;
            if looks.is_multiple_of(4096) {
                // Whoever has the last piece may be waiting for this processor.
                std::thread::yield_now();
            }
        }
        if board.panicked.swap(false, Ordering::Relaxed) {
            panic!("an operation of the CPU backend panicked, see above");
        }
    }

    /// `work(first, part)` for parts of `out` that start at multiples of `unit`, none smaller than `least` where there are
    /// several; a few for every thread.
    pub(super) fn divide<T: Send>(
        &self,
        out: &mut [T],
        unit: usize,
        least: usize,
        work: &(dyn Fn(usize, &mut [T]) + Sync),
    ) {
        let len = out.len();
        let part = len.div_ceil(4 * self.size()).max(least).next_multiple_of(unit).max(1);
        let base = Base(out.as_mut_ptr());
        self.run(len.div_ceil(part), &|piece| {
            let first = piece * part;
            // SAFETY: parts of different pieces do not overlap, and each lies inside `out`, which is borrowed.
            work(first, unsafe { std::slice::from_raw_parts_mut(base.get().add(first), part.min(len - first)) });
        });
    }
}

/// The start of what pieces write to, each its own part.
struct Base<T>(*mut T);

// SAFETY: pieces make references to parts that do not overlap.
unsafe impl<T: Send> Sync for Base<T> {}

impl<T> Base<T> {
    fn get(&self) -> *mut T {
        self.0
    }
}

impl Drop for Team {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        self.shared.wake();
        for thread in self.threads.drain(..) {
            thread.thread().unpark();
            // It has nothing to say: work that panics is caught.
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_piece_is_done_once() {
        let team = Team::new(3);
        for pieces in (0..400).map(|i| i * 7 % 97) {
            let done: Vec<AtomicUsize> = (0..pieces).map(|_| AtomicUsize::new(0)).collect();
            team.run(pieces, &|piece| {
                done[piece].fetch_add(1, Ordering::Relaxed);
                // Inside an operation the team is taken: the same thread does it.
                team.run(2, &|_| ());
            });
            assert!(done.iter().all(|n| n.load(Ordering::Relaxed) == 1), "{pieces}");
            if pieces == 50 {
                // Long enough for all to fall asleep.
                std::thread::sleep(2 * LOOKS + Duration::from_millis(5));
            }
        }
    }

    #[test]
    fn callers_take_turns_and_parts_are_whole() {
        let team = Team::new(4);
        std::thread::scope(|scope| {
            for caller in 0..4usize {
                let team = &team;
                scope.spawn(move || {
                    for len in [0, 1, 8, 31, 1000] {
                        let mut out = vec![0; len];
                        team.divide(&mut out, 8, 16, &|first, part| {
                            assert!(first.is_multiple_of(8) && (part.len() >= 16 || first + part.len() == len));
                            part.iter_mut().enumerate().for_each(|(i, n)| *n += caller + first + i);
                        });
                        assert_eq!(out, (caller..caller + len).collect::<Vec<_>>());
                    }
                });
            }
        });
    }

    #[test]
    fn a_panic_is_passed_on_and_the_team_goes_on() {
        let team = Team::new(2);
        let bad = || team.run(8, &|piece| assert!(piece != 5, "piece 5"));
        assert!(std::panic::catch_unwind(std::panic::AssertUnwindSafe(bad)).is_err());
        let sum = AtomicUsize::new(0);
        team.run(8, &|piece| {
            sum.fetch_add(piece, Ordering::Relaxed);
        });
        assert_eq!(sum.into_inner(), 28);
    }
}
