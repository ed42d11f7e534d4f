//! Device rules for the kernel: lines of devices.allow and devices.deny on v1, a program on v2.

use std::os::fd::{AsFd, BorrowedFd};

use nix::errno::Errno;

use crate::plan::cgroup::Rule;
use crate::sys::bpf::{self, Insn};

/// The writes of v1: file and line. Nothing is allowed before them.
pub fn lines(rules: &[Rule]) -> Vec<(&'static str, String)> {
    let mut out = vec![("devices.deny", "a".to_string())];
    for rule in rules {
        let file = if rule.allow { "devices.allow" } else { "devices.deny" };
        if is_everything(rule) {
            // The kernel takes `a` alone, and it forgets all earlier rules.
            out.clear();
            out.push((file, "a".to_string()));
            continue;
        }
        let number = |n: Option<u32>| n.map_or("*".to_string(), |n| n.to_string());
        let kinds: &[char] = if rule.kind == 'a' { &['b', 'c'] } else { &[rule.kind] };
        for kind in kinds {
            out.push((file, format!("{kind} {}:{} {}", number(rule.major), number(rule.minor), access(rule))));
        }
    }
    out
}

fn is_everything(rule: &Rule) -> bool {
    rule.kind == 'a' && rule.major.is_none() && rule.minor.is_none() && rule.read && rule.write && rule.mknod
}

fn access(rule: &Rule) -> String {
    [(rule.read, 'r'), (rule.write, 'w'), (rule.mknod, 'm')].iter().filter(|(on, _)| *on).map(|(_, c)| *c).collect()
}

/// Puts the rules on a v2 cgroup. Rules that allow everything need no program.
pub fn attach(cgroup: BorrowedFd<'_>, rules: &[Rule]) -> nix::Result<()> {
    let Some(program) = program(rules) else { return Ok(()) };
    let program = bpf::load_device_program(&program)?;
    match bpf::attach_device_program(cgroup, program.as_fd()) {
        Err(Errno::EINVAL) => Err(Errno::ENOSYS),
        other => other,
    }
}

const LOAD_WORD: u8 = 0x61;
const MOV: u8 = 0xb7;
const MOV_REG: u8 = 0xbf;
const AND: u8 = 0x57;
const RSH: u8 = 0x77;
const JNE: u8 = 0x55;
const EXIT: u8 = 0x95;
// The low half of a registers byte is the destination.
const CONTEXT: u8 = 1;
const KIND: u8 = 2;
const ACCESS: u8 = 3;
const MAJOR: u8 = 4;
const MINOR: u8 = 5;
const SCRATCH: u8 = 6;

fn insn(code: u8, dst: u8, src: u8, off: i16, imm: i32) -> Insn {
    Insn { code, registers: dst | src << 4, off, imm }
}

/// The program: struct bpf_cgroup_dev_ctx in, 1 for allow out. The last rule of the list is tried first.
fn program(rules: &[Rule]) -> Option<Vec<Insn>> {
    if rules.iter().rev().find(|rule| !rule.allow || is_everything(rule)).is_some_and(|rule| rule.allow) {
        return None;
    }
    let mut out = vec![
        insn(LOAD_WORD, KIND, CONTEXT, 0, 0),
        insn(MOV_REG, ACCESS, KIND, 0, 0),
        insn(AND, KIND, 0, 0, 0xffff),
        insn(RSH, ACCESS, 0, 0, 16),
        insn(LOAD_WORD, MAJOR, CONTEXT, 4, 0),
        insn(LOAD_WORD, MINOR, CONTEXT, 8, 0),
    ];
    let mut closed = false;
    for rule in rules.iter().rev() {
        let block = block(rule);
        closed = block.len() == 2;
        out.extend(block);
        if closed {
            break;
        }
    }
    if !closed {
        out.extend(verdict(false));
    }
    Some(out)
}

fn verdict(allow: bool) -> [Insn; 2] {
    [insn(MOV, 0, 0, 0, allow.into()), insn(EXIT, 0, 0, 0, 0)]
}

/// Tests that jump behind the block when the rule does not apply, then its verdict.
fn block(rule: &Rule) -> Vec<Insn> {
    // BPF_DEVCG_ACC_MKNOD 1, READ 2, WRITE 4; BPF_DEVCG_DEV_BLOCK 1, CHAR 2.
    let mask = i32::from(rule.mknod) | i32::from(rule.read) << 1 | i32::from(rule.write) << 2;
    let mut tests = Vec::new();
    if rule.kind != 'a' {
        tests.push(insn(JNE, KIND, 0, 0, if rule.kind == 'b' { 1 } else { 2 }));
    }
    if rule.allow {
        if mask != 7 {
            // Applies only when it covers all that is asked for.
            tests.push(insn(MOV_REG, SCRATCH, ACCESS, 0, 0));
            tests.push(insn(AND, SCRATCH, 0, 0, !mask & 7));
            tests.push(insn(JNE, SCRATCH, 0, 0, 0));
        }
    } else if mask != 7 {
        // Applies when it covers any of what is asked for: jump behind the block when nothing is left of it.
        tests.push(insn(MOV_REG, SCRATCH, ACCESS, 0, 0));
        tests.push(insn(AND, SCRATCH, 0, 0, mask));
        tests.push(insn(0x15, SCRATCH, 0, 0, 0));
    }
    for (register, number) in [(MAJOR, rule.major), (MINOR, rule.minor)] {
        if let Some(number) = number {
            tests.push(insn(JNE, register, 0, 0, number as i32));
        }
    }
    let verdict = verdict(rule.allow);
    let len = tests.len() + verdict.len();
    for (at, test) in tests.iter_mut().enumerate() {
        if matches!(test.code, JNE | 0x15) {
            test.off = (len - at - 1) as i16;
        }
    }
    tests.extend(verdict);
    tests
}

#[cfg(test)]
mod tests {
    use super::*;

    const NONE: Rule = Rule { allow: false, kind: 'a', major: None, minor: None, read: true, write: true, mknod: true };
    const NULL: Rule =
        Rule { allow: true, kind: 'c', major: Some(1), minor: Some(3), read: true, write: true, mknod: false };

    /// Runs a program on one request.
    fn run(program: &[Insn], kind: u32, access: u32, major: u32, minor: u32) -> bool {
        let context = [kind | access << 16, major, minor];
        let mut r = [0u64; 16];
        let mut at = 0i64;
        loop {
            let i = program[at as usize];
            let (dst, src) = (usize::from(i.registers & 15), usize::from(i.registers >> 4));
            at += 1;
            match i.code {
                LOAD_WORD => r[dst] = context[i.off as usize / 4].into(),
                MOV => r[dst] = i.imm as u64,
                MOV_REG => r[dst] = r[src],
                AND => r[dst] &= i.imm as u64,
                RSH => r[dst] >>= i.imm,
                JNE if r[dst] != i.imm as u64 => at += i64::from(i.off),
                0x15 if r[dst] == i.imm as u64 => at += i64::from(i.off),
                JNE | 0x15 => {}
                EXIT => return r[0] != 0,
                code => panic!("operation {code:#x}"),
            }
        }
    }

    #[test]
    fn later_rules_win_and_access_is_exact() {
        let no_write =
            Rule { allow: false, kind: 'c', major: Some(1), minor: Some(5), read: false, write: true, mknod: false };
        let all_one =
            Rule { allow: true, kind: 'c', major: Some(1), minor: None, read: true, write: true, mknod: true };
        let program = program(&[NONE, NULL, all_one, no_write]).unwrap();
        assert!(run(&program, 2, 2 | 4, 1, 3));
        assert!(run(&program, 2, 2, 1, 5), "only writing is denied");
        assert!(!run(&program, 2, 4, 1, 5));
        assert!(!run(&program, 2, 2 | 4, 1, 5));
        assert!(!run(&program, 1, 2, 1, 3), "a block device");
        assert!(!run(&program, 2, 2, 5, 0));
    }

    #[test]
    fn nothing_is_allowed_by_default_and_everything_needs_no_program() {
        let only_null = program(&[NULL]).unwrap();
        assert!(run(&only_null, 2, 2, 1, 3));
        assert!(!run(&only_null, 2, 1, 1, 3), "mknod is not in the rule");
        assert!(!run(&only_null, 2, 2, 1, 5));
        let everything = Rule { allow: true, ..NONE };
        assert_eq!(program(&[NONE, everything, NULL]), None);
        assert!(program(&[everything, NONE]).is_some());
    }

    #[test]
    fn v1_lines_start_from_nothing() {
        assert_eq!(
            lines(&[NONE, NULL]),
            [("devices.deny", "a".to_string()), ("devices.allow", "c 1:3 rw".to_string())]
        );
        let everything = Rule { allow: true, ..NONE };
        assert_eq!(lines(&[NULL, everything]), [("devices.allow", "a".to_string())]);
    }
}
