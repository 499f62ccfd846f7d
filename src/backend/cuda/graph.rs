//! Graphs: recorded once, replayed as one launch.
//!
//! Nobody may wait for a whole context while one of its streams is being recorded, in any mode of recording and from any
//! thread (CUDA C++ Programming Guide, "Prohibited and Unhandled Operations" of stream capture): the wait fails, and the
//! recording ends with CUDA_ERROR_STREAM_CAPTURE_INVALIDATED. Drivers of one process share their device's context, and
//! cuBLAS waits for it when a handle goes (cuBLAS, `cublasDestroy`). So recordings and such waits keep out of each
//! other's way, process-wide.

use std::ptr;
use std::rc::Rc;
use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use anyhow::Result;
use cudarc::driver::{result, sys};

use super::driver::{Driver, failed};

/// Read by recordings, which do not mind each other; written by what waits for everything.
static RECORDING: RwLock<()> = RwLock::new(());

fn recording() -> RwLockReadGuard<'static, ()> {
    RECORDING.read().unwrap_or_else(PoisonError::into_inner)
}

/// Keeps recordings out until it is dropped; this thread must not be recording.
pub(super) fn undisturbed() -> RwLockWriteGuard<'static, ()> {
    RECORDING.write().unwrap_or_else(PoisonError::into_inner)
}

impl Driver {
    /// Records what `work` queues instead of running it; [`undisturbed`] waits until that is done.
    pub(super) fn capture(self: &Rc<Self>, work: &mut dyn FnMut() -> Result<()>) -> Result<Graph> {
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED;
        let going_on = recording();
        let stream = self.enter()?;
        // SAFETY: the stream is ours alone.
        unsafe { result::stream::begin_capture(stream, mode) }.map_err(|e| failed("recording", e))?;
        let queued = work();
        self.enter()?;
        // SAFETY: recording was begun above.
        let graph = unsafe { result::stream::end_capture(stream) }.map_err(|e| failed("recording", e));
        drop(going_on);
        queued?;
        let graph = graph?;
        let mut exec = ptr::null_mut();
        // SAFETY: `graph` was just recorded; it is not needed once instantiated.
        let made = unsafe {
            let made = sys::cuGraphInstantiateWithFlags(&mut exec, graph, 0).result();
            let _ = result::graph::destroy(graph);
            made
        };
        made.map_err(|e| failed("making a graph", e))?;
        Ok(Graph { driver: Rc::clone(self), exec })
    }
}

/// Recorded operations.
pub(super) struct Graph {
    driver: Rc<Driver>,
    exec: sys::CUgraphExec,
}

impl Graph {
    /// Queues them all.
    pub(super) fn launch(&self) -> Result<()> {
        let stream = self.driver.enter()?;
        // SAFETY: instantiated by `capture`, on the same driver.
        unsafe { result::graph::launch(self.exec, stream) }.map_err(|e| failed("replaying a graph", e))
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        if self.driver.settles() {
            // SAFETY: instantiated by `capture`, destroyed once.
            let _ = unsafe { result::graph::exec_destroy(self.exec) };
        }
    }
}
