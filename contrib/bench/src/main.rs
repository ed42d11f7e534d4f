//! The benchmark: skiff beside runc, crun and the Go shim, in turns within one run, as medians and ratios.
//!
//! `bench [--quick] [--json FILE] [--svg FILE] [cli] [shim] [memory] [output] [growth] [containerd] [pods] [soak]`, the
//! last one only when it is asked for; SKIFF, SHIM, RUNC, CRUN, GO_SHIM and FLOOR name programs.

mod cli;
mod daemon;
mod engine;
mod picture;
mod pods;
mod shim;
mod soak;

use std::path::PathBuf;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

/// Who is measured: a name, and what yields a figure.
pub type Contender<'a> = (&'a str, Box<dyn FnMut() -> f64 + 'a>);

type Section = fn(&mut Bench);

const SETTLE: Duration = Duration::from_millis(25);

/// What is compared, and how often.
pub struct Bench {
    /// Rounds of each comparison.
    pub rounds: usize,
    results: Vec<Value>,
    /// A reference varied so much that ratios mean little.
    noisy: bool,
}

/// The program that a variable names, or the default if it is there.
pub fn program(variable: &str, default: &str) -> Option<PathBuf> {
    let path = std::env::var_os(variable).map_or_else(|| PathBuf::from(default), PathBuf::from);
    if path.is_absolute() {
        return path.exists().then_some(path);
    }
    let dirs = std::env::var("PATH").unwrap_or_default();
    dirs.split(':').map(|dir| PathBuf::from(dir).join(&path)).find(|path| path.exists())
}

/// Milliseconds that `work` takes.
pub fn milliseconds(work: impl FnOnce()) -> f64 {
    let start = Instant::now();
    work();
    start.elapsed().as_secs_f64() * 1e3
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted[sorted.len() / 2]
}

impl Bench {
    /// Measures each of `contenders` in turns; the first one is skiff. Every function yields a figure in `unit`.
    pub fn compare(&mut self, what: &str, unit: &str, contenders: Vec<Contender<'_>>) {
        self.compare_rounds(what, unit, self.rounds, contenders);
    }

    /// The same with a number of rounds of its own.
    pub fn compare_rounds(&mut self, what: &str, unit: &str, rounds: usize, mut contenders: Vec<Contender<'_>>) {
        let mut figures: Vec<Vec<f64>> = vec![Vec::new(); contenders.len()];
        for _ in 0..rounds {
            for (at, (_, run)) in contenders.iter_mut().enumerate() {
                // What the one before has left to the kernel, namespaces above all, is not this one's to pay.
                std::thread::sleep(SETTLE);
                figures[at].push(run());
            }
        }
        let skiff = median(&figures[0]);
        println!("\n{what}");
        for ((name, _), figures) in contenders.iter().zip(&figures) {
            let (middle, least) = (median(figures), figures.iter().copied().fold(f64::INFINITY, f64::min));
            // Nothing over nothing is the same.
            let ratio = if skiff == middle { 1.0 } else { skiff / middle };
            println!("  {name:<10} median {middle:>10.2} {unit:<6} least {least:>10.2}   skiff over it {ratio:>6.3}");
            if rounds >= 5 && middle > 2.0 * least {
                self.noisy = true;
            }
            self.results.push(json!({"what": what, "unit": unit, "who": name, "median": middle, "least": least,
                "ratio": ratio, "rounds": rounds}));
        }
    }
}

fn main() {
    let mut words: Vec<String> = std::env::args().skip(1).collect();
    let mut option = |name: &str| -> Option<PathBuf> {
        let at = words.iter().position(|word| word == name)?;
        words.remove(at);
        (at < words.len()).then(|| PathBuf::from(words.remove(at)))
    };
    let (json, svg) = (option("--json"), option("--svg"));
    let quick = words.iter().any(|word| word == "--quick");
    words.retain(|word| word != "--quick");
    let wanted = |section: &str| words.is_empty() || words.iter().any(|word| word == section);
    let mut bench = Bench { rounds: if quick { 9 } else { 31 }, results: Vec::new(), noisy: false };
    let sections: [(&str, Section); 7] = [
        ("cli", cli::run),
        ("shim", shim::lives),
        ("memory", shim::memory),
        ("output", shim::output),
        ("growth", cli::growth),
        ("containerd", engine::run),
        ("pods", pods::run),
    ];
    for (name, run) in sections {
        if wanted(name) {
            run(&mut bench);
        }
    }
    if words.iter().any(|word| word == "soak") {
        soak::run(&mut bench);
    }
    if bench.noisy {
        println!(
            "\nThe machine was noisy: some medians are more than twice the least value. Read the ratios with care."
        );
    }
    let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let all = json!({"kernel": kernel.trim(), "noisy": bench.noisy, "results": bench.results});
    if let Some(path) = json {
        std::fs::write(&path, format!("{all:#}\n")).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    }
    if let Some(path) = svg {
        picture::draw(&path, &bench.results).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    }
}
