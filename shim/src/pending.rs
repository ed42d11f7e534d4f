//! The requests that have not been answered yet: for the log, when somebody asks why nothing happens.

use std::cell::RefCell;
use std::rc::Rc;
use std::time::Instant;

use skiff::Error;

/// A request, as the log names it.
#[derive(Clone, Debug)]
pub struct Call {
    name: &'static str,
    id: String,
    exec_id: String,
    since: Instant,
    /// It changes nothing: nobody misses it when its client has gone away.
    pub only_waits: bool,
}

impl Call {
    /// A call of `name` about a container, or a process of it.
    pub fn new(name: &'static str, id: &str, exec_id: &str) -> Call {
        let since = Instant::now();
        Call { name, id: id.to_string(), exec_id: exec_id.to_string(), since, only_waits: false }
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
#[derive(Clone, Debug, Default)]
pub struct Calls(Rc<RefCell<Vec<Rc<Call>>>>);

impl Calls {
    /// Pending from now on, until [`Calls::answered`].
    pub fn begin(&self, call: Call) -> Rc<Call> {
        let call = Rc::new(call);
        self.0.borrow_mut().push(call.clone());
        call
    }

    /// Pending no more.
    pub fn answered(&self, call: &Rc<Call>, error: Option<&Error>) {
        self.0.borrow_mut().retain(|one| !Rc::ptr_eq(one, call));
        let time = call.since.elapsed();
        match error {
            None => log::debug!("{}: answered after {time:?}", call.describe()),
            Some(err) => log::debug!("{}: refused after {time:?}: {err}", call.describe()),
        }
    }

    /// Lines for the log.
    pub fn describe(&self) -> Vec<String> {
        let line = |call: &Rc<Call>| format!("pending for {:?}: {}", call.since.elapsed(), call.describe());
        self.0.borrow().iter().map(line).collect()
    }
}
