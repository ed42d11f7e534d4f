//! Through containerd: `ctr run`, many containers at once, execs.

use skiff_test_support::{Containerd, Version, unique};

use crate::shim::own;
use crate::{Bench, milliseconds};

/// `ctr run --rm`, 100 containers 10 at a time, `ctr tasks exec`.
pub fn run(bench: &mut Bench) {
    let shim = own().expect("the shim is built (SHIM names it)");
    let containerd = Containerd::start(Version::V1, &shim);
    let runtimes = [("skiff", "io.containerd.skiff.v2"), ("Go shim", "io.containerd.runc.v2")];
    let one = |runtime: &str| {
        let done = containerd.run_as(runtime, &["--rm"], &unique("one"), &["true"]);
        assert_eq!(done.code, 0, "{}", done.err);
    };
    let contenders = runtimes.map(|(name, runtime)| {
        let run: Box<dyn FnMut() -> f64> = Box::new(move || milliseconds(|| one(runtime)));
        (name, run)
    });
    bench.compare_rounds("containerd: ctr run --rm", "ms", bench.rounds.min(15), contenders.into());
    let hundred = |runtime: &str| {
        std::thread::scope(|scope| {
            for _ in 0..10 {
                scope.spawn(|| (0..10).for_each(|_| one(runtime)));
            }
        });
    };
    let contenders = runtimes.map(|(name, runtime)| {
        let run: Box<dyn FnMut() -> f64> = Box::new(move || milliseconds(|| hundred(runtime)));
        (name, run)
    });
    bench.compare_rounds("containerd: 100 containers, 10 at a time", "ms", 3, contenders.into());
    let ids = runtimes.map(|(_, runtime)| {
        let id = unique("exec");
        containerd.run_as(runtime, &["-d"], &id, &["sleep", "1000"]).ok();
        id
    });
    let contenders = std::array::from_fn::<_, 2, _>(|at| {
        let (id, containerd) = (&ids[at], &containerd);
        let run: Box<dyn FnMut() -> f64> = Box::new(move || {
            milliseconds(|| drop(containerd.ctr(&["tasks", "exec", "--exec-id", &unique("e"), id, "true"]).ok()))
        });
        (runtimes[at].0, run)
    });
    bench.compare_rounds("containerd: ctr tasks exec", "ms", bench.rounds.min(15), contenders.into());
    for id in &ids {
        containerd.ctr(&["tasks", "rm", "-f", id]);
        containerd.ctr(&["containers", "rm", id]);
    }
}
