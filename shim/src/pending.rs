//! The requests that have not been answered yet: for the log, when somebody asks why nothing happens.

use std::cell::RefCell;
use std::rc::Rc;
use std::time::Instant;

use containerd_shim_protos::ttrpc::asynchronous::TtrpcContext;
use skiff::Error;
use skiff::trace::Trace;

use crate::spans::{Context, Spans};

/// A request, as the log names it.
#[derive(Clone, Debug)]
pub struct Call {
    /// Its name.
    pub name: &'static str,
    /// The container, or the sandbox.
    pub id: String,
    /// The exec process; may be empty.
    pub exec_id: String,
    /// When it came.
    pub since: Instant,
    /// Where its span belongs.
    pub parent: Option<Context>,
    /// It changes nothing: nobody misses it when its client has gone away.
    pub only_waits: bool,
}

impl Call {
    /// A call of `name` about a container, or a process of it.
    pub fn new(name: &'static str, id: &str, exec_id: &str) -> Call {
        let since = Instant::now();
        Call { name, id: id.to_string(), exec_id: exec_id.to_string(), since, parent: None, only_waits: false }
    }

    /// The same, as a part of what its client is at.
    pub fn of(self, context: &TtrpcContext) -> Call {
        let parent = context.metadata.get("traceparent").and_then(|values| Context::parse(values.first()?));
        Call { parent, ..self }
    }

    /// One that waits for something and changes nothing.
    pub fn only_waits(self) -> Call {
        Call { only_waits: true, ..self }
    }

    fn describe(&self) -> String {
        let slash = if self.exec_id.is_empty() { "" } else { "/" };
        format!("{} {}{slash}{}", self.name, self.id, self.exec_id)
    }
}

/// All that are pending. Clones share them.
#[derive(Clone, Default)]
pub struct Calls {
    pending: Rc<RefCell<Vec<Rc<Call>>>>,
    spans: Option<Rc<Spans>>,
}

impl Calls {
    /// None yet; where somebody wants spans, all will have one.
    pub fn new(spans: Option<Rc<Spans>>) -> Calls {
        Calls { pending: Rc::default(), spans }
    }

    /// A timeline for a create that is pending, if somebody wants one.
    pub fn trace(&self, id: &str) -> Option<Trace> {
        self.spans.as_ref()?.of_create(id)
    }

    /// Pending from now on, until [`Calls::answered`].
    pub fn begin(&self, call: Call) -> Rc<Call> {
        let call = Rc::new(call);
        self.pending.borrow_mut().push(call.clone());
        call
    }

    /// Pending no more.
    pub fn answered(&self, call: &Rc<Call>, error: Option<&Error>) {
        self.pending.borrow_mut().retain(|one| !Rc::ptr_eq(one, call));
        let time = call.since.elapsed();
        if let Some(spans) = &self.spans {
            spans.add(call, error);
        }
        match error {
            None => log::debug!("{}: answered after {time:?}", call.describe()),
            Some(err) => log::debug!("{}: refused after {time:?}: {err}", call.describe()),
        }
    }

    /// Lines for the log.
    pub fn describe(&self) -> Vec<String> {
        let line = |call: &Rc<Call>| format!("pending for {:?}: {}", call.since.elapsed(), call.describe());
        self.pending.borrow().iter().map(line).collect()
    }
}
