//! The few protocol buffer fields of CRIU's service protocol that are used (criu, images/rpc.proto).

use crate::{Error, Kind, Result};

/// A message that is being written.
#[derive(Clone, Debug, Default)]
pub struct Message(Vec<u8>);

impl Message {
    fn varint(&mut self, mut value: u64) {
        while value >= 0x80 {
            self.0.push(value as u8 | 0x80);
            value >>= 7;
        }
        self.0.push(value as u8);
    }

    /// An integer or enum field.
    pub fn number(&mut self, field: u32, value: u64) -> &mut Self {
        self.varint(u64::from(field) << 3);
        self.varint(value);
        self
    }

    /// A boolean field, when it is true.
    pub fn flag(&mut self, field: u32, value: bool) -> &mut Self {
        if value { self.number(field, 1) } else { self }
    }

    /// A string or bytes field.
    pub fn bytes(&mut self, field: u32, value: &[u8]) -> &mut Self {
        self.varint(u64::from(field) << 3 | 2);
        self.varint(value.len() as u64);
        self.0.extend_from_slice(value);
        self
    }

    /// A string field.
    pub fn text(&mut self, field: u32, value: &str) -> &mut Self {
        self.bytes(field, value.as_bytes())
    }

    /// A message field.
    pub fn message(&mut self, field: u32, value: &Message) -> &mut Self {
        self.bytes(field, &value.0)
    }

    /// The encoded message.
    pub fn encoded(&self) -> &[u8] {
        &self.0
    }
}

/// What CRIU says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Response {
    /// criu_req_type.
    pub kind: u64,
    /// The request was done.
    pub success: bool,
    /// The pid of what was restored.
    pub restored: i32,
    /// The name of a notification.
    pub script: String,
    /// The pid that it is about.
    pub pid: i32,
    /// Why it failed.
    pub errno: i32,
    /// The same in words, from those that send any.
    pub message: String,
}

impl Response {
    /// Reads a response.
    pub fn decode(bytes: &[u8]) -> Result<Response> {
        let mut out = Response::default();
        for field in Fields(bytes) {
            match field? {
                (1, Value::Number(kind)) => out.kind = kind,
                (2, Value::Number(success)) => out.success = success != 0,
                (4, Value::Bytes(restore)) => {
                    for field in Fields(restore) {
                        if let (1, Value::Number(pid)) = field? {
                            out.restored = pid as i32;
                        }
                    }
                }
                (5, Value::Bytes(notify)) => {
                    for field in Fields(notify) {
                        match field? {
                            (1, Value::Bytes(script)) => out.script = String::from_utf8_lossy(script).into_owned(),
                            (2, Value::Number(pid)) => out.pid = pid as i32,
                            _ => {}
                        }
                    }
                }
                (7, Value::Number(errno)) => out.errno = errno as i32,
                (9, Value::Bytes(text)) => out.message = String::from_utf8_lossy(text).trim_end().to_string(),
                _ => {}
            }
        }
        Ok(out)
    }
}

enum Value<'a> {
    Number(u64),
    Bytes(&'a [u8]),
}

struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn varint(&mut self) -> Option<u64> {
        let mut value = 0;
        for shift in (0..64).step_by(7) {
            let (first, rest) = self.0.split_first()?;
            self.0 = rest;
            value |= u64::from(first & 0x7f) << shift;
            if first & 0x80 == 0 {
                return Some(value);
            }
        }
        None
    }

    fn take(&mut self, count: u64) -> Option<&'a [u8]> {
        let count = usize::try_from(count).ok().filter(|count| *count <= self.0.len())?;
        let (taken, rest) = self.0.split_at(count);
        self.0 = rest;
        Some(taken)
    }

    fn field(&mut self) -> Option<(u64, Value<'a>)> {
        let key = self.varint()?;
        let value = match key & 7 {
            0 => Value::Number(self.varint()?),
            1 => Value::Bytes(self.take(8)?),
            2 => {
                let length = self.varint()?;
                Value::Bytes(self.take(length)?)
            }
            5 => Value::Bytes(self.take(4)?),
            _ => return None,
        };
        Some((key >> 3, value))
    }
}

impl<'a> Iterator for Fields<'a> {
    type Item = Result<(u64, Value<'a>)>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.0.is_empty() {
            return None;
        }
        let field = self.field();
        if field.is_none() {
            self.0 = &[];
        }
        Some(field.ok_or_else(|| Error::new(Kind::System, "criu's answer is not readable")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_encoded() {
        let mut inner = Message::default();
        inner.text(1, "net[1]").number(2, 300);
        let mut out = Message::default();
        out.number(1, 1).flag(3, false).flag(4, true).message(27, &inner).number(2, u64::MAX);
        let want =
            b"\x08\x01\x20\x01\xda\x01\x0b\x0a\x06net[1]\x10\xac\x02\x10\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01";
        assert_eq!(out.encoded(), want);
    }

    #[test]
    fn responses_are_decoded() {
        let mut notify = Message::default();
        notify.text(1, "post-restore").number(2, 77);
        let mut restore = Message::default();
        restore.number(1, 78);
        let mut text = Message::default();
        text.number(1, 6)
            .number(2, 1)
            .message(4, &restore)
            .message(5, &notify)
            .number(7, 22)
            .text(9, "why\n")
            .number(99, 1);
        let want = Response {
            kind: 6,
            success: true,
            restored: 78,
            script: "post-restore".into(),
            pid: 77,
            errno: 22,
            message: "why".into(),
        };
        assert_eq!(Response::decode(text.encoded()).unwrap(), want);
        for cut in [1, 3, text.encoded().len() - 1] {
            assert!(Response::decode(&text.encoded()[..cut]).is_err(), "{cut}");
        }
        for bad in [&b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01"[..], b"\x0a\xff", b"\x0b"] {
            assert!(Response::decode(bad).is_err(), "{bad:?}");
        }
    }
}
