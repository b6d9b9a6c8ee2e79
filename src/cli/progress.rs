//! Progress: a bar for people, lines for logs, JSON for scripts; and the wish to stop.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use passes::exec::Progress;

/// How progress is shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Mode {
    /// A bar on a terminal, lines otherwise.
    Auto,
    /// Lines.
    Plain,
    /// One JSON object per line.
    Json,
    /// Nothing.
    None,
}

static CANCELLED: AtomicBool = AtomicBool::new(false);

/// From now on the first Ctrl-C asks the run to stop cleanly; a second one ends the process at once, half-written files gone.
pub(super) fn watch_interrupts() {
    static WATCH: OnceLock<()> = OnceLock::new();
    WATCH.get_or_init(|| {
        let _ = ctrlc::set_handler(|| {
            if CANCELLED.swap(true, Ordering::SeqCst) {
                crate::emit::discard_staged();
                #[expect(clippy::exit, reason = "the user asked twice; threads may be anywhere in their work")]
                std::process::exit(130);
            }
            super::eprint("\nstopping after the current step; press Ctrl-C again to stop at once\n");
        });
    });
}

/// Whether the user asked to stop.
pub(super) fn is_cancelled() -> bool {
    CANCELLED.load(Ordering::SeqCst)
}

/// Nothing is shown for work shorter than this, and plain lines come no more often.
const PATIENCE: Duration = Duration::from_secs(2);

/// Shows progress on standard error.
pub(crate) struct Shown {
    mode: Mode,
    stage: Mutex<Stage>,
    done: AtomicU64,
}

struct Stage {
    name: String,
    total: u64,
    since: Instant,
    told: Instant,
    /// What is lost, where something is being learned.
    loss: Option<f64>,
    bar: Option<ProgressBar>,
}

impl Shown {
    pub(crate) fn new(mode: Mode) -> Self {
        watch_interrupts();
        let terminal = std::io::IsTerminal::is_terminal(&std::io::stderr());
        let mode = match mode {
            Mode::Auto if terminal => Mode::Auto,
            Mode::Auto => Mode::Plain,
            other => other,
        };
        let now = Instant::now();
        let stage = Stage { name: String::new(), total: 0, since: now, told: now, loss: None, bar: None };
        Self { mode, stage: Mutex::new(stage), done: AtomicU64::new(0) }
    }

    fn tell(&self, stage: &Stage, done: u64) {
        let seconds = stage.since.elapsed().as_secs_f64().max(1e-6);
        let rate = done as f64 / seconds;
        let left = stage.total.saturating_sub(done) as f64 / rate.max(1e-9);
        match self.mode {
            Mode::Plain => {
                let loss = stage.loss.map_or_else(String::new, |loss| format!(", loss {loss:.4}"));
                super::eprint(&format!(
                    "{}: {done}/{} ({rate:.1}/s, {left:.0} s left{loss})\n",
                    stage.name, stage.total
                ));
            }
            Mode::Json => {
                let mut line = serde_json::json!({ "stage": stage.name, "done": done, "total": stage.total, "rate": rate, "eta_seconds": left });
                if let Some(loss) = stage.loss {
                    line["loss"] = loss.into();
                }
                super::eprint(&format!("{line}\n"));
            }
            Mode::Auto | Mode::None => {}
        }
    }
}

impl Progress for Shown {
    fn begin(&self, stage: &str, total: u64) {
        let mut current = self.stage.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        let bar = (self.mode == Mode::Auto).then(|| {
            let bar = ProgressBar::with_draw_target(Some(total), ProgressDrawTarget::stderr_with_hz(5));
            let style = ProgressStyle::with_template("{msg} [{bar:30}] {pos}/{len} {per_sec} {eta} left");
            bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
            bar.set_message(stage.to_owned());
            bar
        });
        *current = Stage { name: stage.to_owned(), total, since: now, told: now, loss: None, bar };
        self.done.store(0, Ordering::Relaxed);
    }

    fn step(&self) {
        let done = self.done.fetch_add(1, Ordering::Relaxed) + 1;
        let mut stage = self.stage.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(bar) = &stage.bar {
            bar.set_position(done);
        } else if stage.told.elapsed() >= PATIENCE {
            stage.told = Instant::now();
            self.tell(&stage, done);
        }
    }

    fn loss(&self, loss: f64) {
        let mut stage = self.stage.lock().unwrap_or_else(PoisonError::into_inner);
        stage.loss = Some(loss).filter(|loss| loss.is_finite());
        if let Some(bar) = &stage.bar {
            bar.set_message(format!("{}, loss {loss:.4}", stage.name));
        }
    }

    fn end(&self) {
        let mut stage = self.stage.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(bar) = stage.bar.take() {
            bar.finish_and_clear();
        } else if stage.since.elapsed() >= PATIENCE {
            self.tell(&stage, self.done.load(Ordering::Relaxed));
        }
    }

    fn cancelled(&self) -> bool {
        is_cancelled()
    }
}
