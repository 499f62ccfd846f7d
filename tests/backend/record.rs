//! The sweep's clock: every launch has its time, in order, and the bytes of memory take theirs.

use decdec::backend::record::{Clock, Recorder};
use decdec::dec::{DecPlan, Selection};
use decdec::format::Storage;
use decdec::random::RandomWeights;

use crate::UnderTest;

pub(crate) fn every_launch_is_timed<B: UnderTest>(backend: &B) {
    let (inputs, outputs) = (1024, 512);
    let linear = RandomWeights::single(inputs, outputs, Storage::ANYPREC, 3, 1).unwrap();
    let matrix = backend.matrix(&linear).unwrap();
    let thresholds = linear.thresholds.as_ref().unwrap();
    let plan = DecPlan::new(inputs, outputs, thresholds, 64, 2, Selection::Bucket).unwrap();
    let plan = backend.plan(&matrix, &plan).unwrap();
    let x = backend.vector(inputs).unwrap();
    let mut y = backend.vector(outputs).unwrap();
    // More than one reading of time stamps takes; products without compensation, then pairs.
    let kinds: Vec<usize> = (0..150).map(|i| i % 2).collect();
    let clocks = if backend.device().id.starts_with("cuda") {
        vec![Clock::Auto, Clock::Cupti, Clock::Events, Clock::Once]
    } else {
        vec![Clock::Auto]
    };
    for clock in clocks {
        let mut recorder = backend.recorder(clock).unwrap();
        let mut last = 0;
        for compensated in [false, true] {
            let mut launch = |_| match compensated {
                false => backend.gemv(&matrix, &x, &mut y),
                true => backend.dec_gemv(&matrix, &plan, &x, &mut y),
            };
            let launches = recorder.record(backend, &kinds, &mut launch).unwrap();
            assert_eq!(launches.len(), kinds.len(), "{clock:?}");
            for launch in &launches {
                let dec_end = launch.dec.as_ref().map_or(0, |dec| dec.end_ns);
                for record in [Some(&launch.gemv), launch.dec.as_ref()].into_iter().flatten() {
                    assert!(record.start_ns > 0 && record.end_ns > record.start_ns, "{clock:?}: {record:?}");
                    assert!(record.end_ns - record.start_ns < 1_000_000_000, "{clock:?}: {record:?}");
                }
                assert!(launch.gemv.end_ns > last, "{clock:?}: launches end one after the other");
                last = launch.gemv.end_ns.max(dec_end);
                assert!(compensated || launch.dec.is_none(), "{clock:?}: {launch:?}");
            }
        }
        assert!(!recorder.clock().is_empty());
        if backend.device().id.starts_with("wgpu") && recorder.clock() == "timestamp queries" {
            let pairs = recorder.record(backend, &[0, 1], &mut |_| backend.dec_gemv(&matrix, &plan, &x, &mut y));
            let pairs = pairs.unwrap();
            assert!(pairs.iter().all(|pair| pair.dec.is_some()), "the compensation has stamps of its own: {pairs:?}");
        }
    }
}

/// Where a backend measures them itself, within what any machine has.
pub(crate) fn bandwidths_are_measured<B: UnderTest>(backend: &B) {
    let mut recorder = backend.recorder(Clock::Events).unwrap();
    let measured = recorder.bandwidths(backend).unwrap();
    assert_eq!(measured.is_some(), backend.device().id.starts_with("cuda"));
    if let Some(measured) = measured {
        assert!(measured.host_link > 1e9 && measured.host_link < measured.device_memory, "{measured:?}");
        assert!(measured.device_memory < 20e12, "{measured:?}");
    }
}
