//! Compiles a checked seccomp profile to the BPF program that seccomp(2) takes, with libseccomp.

use std::io::{Read, Seek};

use libseccomp::{ScmpAction, ScmpArch, ScmpArgCompare, ScmpCompareOp, ScmpFilterContext, ScmpSyscall};
use oci_spec::runtime::{Arch, LinuxSeccompAction as Action, LinuxSeccompArg, LinuxSeccompOperator as Op};
use serde::{Deserialize, Serialize};

use crate::plan::seccomp::{Listener, Profile};
use crate::sys::process::SockFilter;
use crate::{Error, Result};

/// A compiled filter.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Filter {
    /// Flags for seccomp(2).
    pub flags: u32,
    /// Who is asked about calls.
    #[serde(default)]
    pub listener: Option<Listener>,
    /// Instructions as the kernel's struct sock_filter: code, jt, jf, k.
    instructions: Vec<(u16, u8, u8, u32)>,
}

impl Filter {
    /// Of the bytes of a program.
    pub(super) fn new(program: &[u8], profile: &Profile) -> Filter {
        let instructions = program
            .chunks_exact(8)
            .map(|i| (u16::from_ne_bytes([i[0], i[1]]), i[2], i[3], u32::from_ne_bytes([i[4], i[5], i[6], i[7]])))
            .collect();
        Filter { flags: profile.flags, listener: profile.listener.clone(), instructions }
    }

    /// The program as bytes, as the kernel has it in memory.
    pub(super) fn bytes(&self) -> Vec<u8> {
        let bytes = |&(code, jt, jf, k): &(u16, u8, u8, u32)| {
            let ([c0, c1], [k0, k1, k2, k3]) = (code.to_ne_bytes(), k.to_ne_bytes());
            [c0, c1, jt, jf, k0, k1, k2, k3]
        };
        self.instructions.iter().flat_map(bytes).collect()
    }

    /// The program.
    pub fn program(&self) -> Vec<SockFilter> {
        self.instructions.iter().map(|&(code, jt, jf, k)| SockFilter { code, jt, jf, k }).collect()
    }
}

/// Compiles. Calls that this libseccomp does not know are passed over, as their numbers are not known either.
pub fn compile(profile: &Profile) -> Result<Filter> {
    let bad = |what: String| move |err: libseccomp::error::SeccompError| Error::invalid(what, err);
    let default = action(profile.default_action, profile.default_errno);
    let mut context = ScmpFilterContext::new(default).map_err(bad("linux.seccomp.defaultAction".into()))?;
    for (at, arch) in profile.architectures.iter().enumerate() {
        let field = format!("linux.seccomp.architectures[{at}]");
        context.add_arch(architecture(*arch)).map_err(bad(field))?;
    }
    for (at, rule) in profile.syscalls.iter().enumerate() {
        let field = format!("linux.seccomp.syscalls[{at}]");
        let act = action(rule.action(), rule.errno_ret());
        if act == default {
            continue;
        }
        let args = rule.args().as_deref().unwrap_or_default();
        for name in rule.names() {
            let Ok(syscall) = ScmpSyscall::from_name(name) else { continue };
            let added = match one_rule(args) {
                Some(conditions) if conditions.is_empty() => context.add_rule(act, syscall).map(drop),
                Some(conditions) => context.add_rule_conditional(act, syscall, &conditions).map(drop),
                // libseccomp takes one condition per argument in a rule: several become rules of their own.
                None => args
                    .iter()
                    .try_for_each(|arg| context.add_rule_conditional(act, syscall, &[compare(arg)]).map(drop)),
            };
            added.map_err(bad(format!("{field}: {name}")))?;
        }
    }
    let file = memfd()?;
    context.export_bpf(&file).map_err(bad("linux.seccomp".into()))?;
    let mut filter = Filter::new(&read(file)?, profile);
    let mut instructions = unknown_calls(profile);
    instructions.append(&mut filter.instructions);
    filter.instructions = instructions;
    Ok(filter)
}

/// Classic BPF of linux/filter.h.
const LOAD: u16 = 0x20;
const JUMP: u16 = 0x05;
const JUMP_EQUAL: u16 = 0x15;
const JUMP_GREATER: u16 = 0x25;
const JUMP_SET: u16 = 0x45;
const RETURN: u16 = 0x06;
const RETURN_ENOSYS: u32 = 0x0005_0000 | libc::ENOSYS as u32;
const X32_BIT: u32 = 0x4000_0000;

/// A head for the program: calls that are younger than every call the profile knows fail with ENOSYS, as on a kernel of
/// the profile's time, so that a C library falls back to an older one. Only where the default is to deny.
fn unknown_calls(profile: &Profile) -> Vec<(u16, u8, u8, u32)> {
    let permissive = matches!(profile.default_action, Action::ScmpActAllow | Action::ScmpActLog | Action::ScmpActTrace);
    if permissive || profile.default_errno == Some(libc::ENOSYS as u32) {
        return Vec::new();
    }
    let mut arches = vec![ScmpArch::native()];
    arches
        .extend(profile.architectures.iter().map(|arch| architecture(*arch)).filter(|arch| *arch != ScmpArch::Native));
    arches.dedup();
    let mut blocks = Vec::new();
    for arch in arches {
        let Some(token) = audit_arch(arch) else { continue };
        let names = profile.syscalls.iter().flat_map(|rule| rule.names());
        let numbers = names.filter_map(|name| ScmpSyscall::from_name_by_arch(name, arch).ok());
        let Some(last) = numbers.map(ScmpSyscall::as_raw_syscall).filter(|n| *n >= 0).max() else { continue };
        let mut block = vec![(JUMP_EQUAL, 0, 0, token), (LOAD, 0, 0, 0)];
        if arch == ScmpArch::X8664 {
            // The other ABI of this token has numbers of its own: left to the filter.
            block.push((JUMP_SET, 2, 0, X32_BIT));
        }
        block.extend([(JUMP_GREATER, 0, 1, last as u32), (RETURN, 0, 0, RETURN_ENOSYS), (JUMP, 0, 0, 0)]);
        block[0].2 = (block.len() - 1) as u8;
        blocks.push(block);
    }
    if blocks.is_empty() {
        return Vec::new();
    }
    let mut out = vec![(LOAD, 0, 0, 4)];
    out.extend(blocks.into_iter().flatten());
    let end = out.len();
    for (at, instruction) in out.iter_mut().enumerate().filter(|(_, i)| i.0 == JUMP) {
        instruction.3 = (end - at - 1) as u32;
    }
    out
}

/// AUDIT_ARCH_* of linux/audit.h.
fn audit_arch(arch: ScmpArch) -> Option<u32> {
    Some(match arch {
        ScmpArch::X8664 => 0xc000_003e,
        ScmpArch::X86 => 0x4000_0003,
        ScmpArch::Aarch64 => 0xc000_00b7,
        ScmpArch::Arm => 0x4000_0028,
        ScmpArch::Riscv64 => 0xc000_00f3,
        ScmpArch::S390X => 0x8000_0016,
        ScmpArch::S390 => 0x16,
        ScmpArch::Ppc64Le => 0xc000_0015,
        ScmpArch::Ppc64 => 0x8000_0015,
        ScmpArch::Loongarch64 => 0xc000_0102,
        _ => return None,
    })
}

fn memfd() -> Result<std::fs::File> {
    use nix::sys::memfd::{MFdFlags, memfd_create};
    let fd = memfd_create(c"seccomp", MFdFlags::MFD_CLOEXEC).map_err(|e| Error::sys("create memfd", e))?;
    Ok(fd.into())
}

fn read(mut file: std::fs::File) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    file.rewind().and_then(|()| file.read_to_end(&mut bytes)).map_err(|e| Error::io("read seccomp program", &e))?;
    Ok(bytes)
}

fn one_rule(args: &[LinuxSeccompArg]) -> Option<Vec<ScmpArgCompare>> {
    let mut seen = [false; 6];
    for arg in args {
        if std::mem::replace(&mut seen[arg.index()], true) {
            return None;
        }
    }
    Some(args.iter().map(compare).collect())
}

fn compare(arg: &LinuxSeccompArg) -> ScmpArgCompare {
    let (op, value) = match arg.op() {
        Op::ScmpCmpNe => (ScmpCompareOp::NotEqual, arg.value()),
        Op::ScmpCmpLt => (ScmpCompareOp::Less, arg.value()),
        Op::ScmpCmpLe => (ScmpCompareOp::LessOrEqual, arg.value()),
        Op::ScmpCmpEq => (ScmpCompareOp::Equal, arg.value()),
        Op::ScmpCmpGe => (ScmpCompareOp::GreaterEqual, arg.value()),
        Op::ScmpCmpGt => (ScmpCompareOp::Greater, arg.value()),
        Op::ScmpCmpMaskedEq => (ScmpCompareOp::MaskedEqual(arg.value()), arg.value_two().unwrap_or(0)),
    };
    ScmpArgCompare::new(arg.index() as u32, op, value)
}

fn action(action: Action, errno: Option<u32>) -> ScmpAction {
    match action {
        Action::ScmpActKill | Action::ScmpActKillThread => ScmpAction::KillThread,
        Action::ScmpActKillProcess => ScmpAction::KillProcess,
        Action::ScmpActTrap => ScmpAction::Trap,
        Action::ScmpActErrno => ScmpAction::Errno(errno.unwrap_or(libc::EPERM as u32) as i32),
        Action::ScmpActNotify => ScmpAction::Notify,
        Action::ScmpActTrace => ScmpAction::Trace(errno.unwrap_or(libc::EPERM as u32) as u16),
        Action::ScmpActLog => ScmpAction::Log,
        Action::ScmpActAllow => ScmpAction::Allow,
    }
}

fn architecture(arch: Arch) -> ScmpArch {
    match arch {
        Arch::ScmpArchNative => ScmpArch::Native,
        Arch::ScmpArchX86 => ScmpArch::X86,
        Arch::ScmpArchX86_64 => ScmpArch::X8664,
        Arch::ScmpArchX32 => ScmpArch::X32,
        Arch::ScmpArchArm => ScmpArch::Arm,
        Arch::ScmpArchAarch64 => ScmpArch::Aarch64,
        Arch::ScmpArchMips => ScmpArch::Mips,
        Arch::ScmpArchMips64 => ScmpArch::Mips64,
        Arch::ScmpArchMips64n32 => ScmpArch::Mips64N32,
        Arch::ScmpArchMipsel => ScmpArch::Mipsel,
        Arch::ScmpArchMipsel64 => ScmpArch::Mipsel64,
        Arch::ScmpArchMipsel64n32 => ScmpArch::Mipsel64N32,
        Arch::ScmpArchPpc => ScmpArch::Ppc,
        Arch::ScmpArchPpc64 => ScmpArch::Ppc64,
        Arch::ScmpArchPpc64le => ScmpArch::Ppc64Le,
        Arch::ScmpArchS390 => ScmpArch::S390,
        Arch::ScmpArchS390x => ScmpArch::S390X,
        Arch::ScmpArchParisc => ScmpArch::Parisc,
        Arch::ScmpArchParisc64 => ScmpArch::Parisc64,
        Arch::ScmpArchRiscv64 => ScmpArch::Riscv64,
        Arch::ScmpArchLoongarch64 => ScmpArch::Loongarch64,
        Arch::ScmpArchM68k => ScmpArch::M68k,
        Arch::ScmpArchSh => ScmpArch::Sh,
        Arch::ScmpArchSheb => ScmpArch::Sheb,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn compiled(seccomp: &str) -> Result<Filter> {
        let json = format!(r#"{{"ociVersion":"1.0.2","linux":{{"seccomp":{seccomp}}}}}"#);
        let spec = serde_json::from_str(&json).unwrap();
        compile(&crate::plan::seccomp::plan(&spec).unwrap().unwrap())
    }

    #[test]
    fn a_profile_becomes_a_program_that_ends_in_its_actions() {
        let filter = compiled(
            r#"{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[
                {"names":["mkdir","mkdirat","no_such_call"],"action":"SCMP_ACT_ERRNO","errnoRet":13}]}"#,
        )
        .unwrap();
        let returns: Vec<u32> = filter.program().iter().filter(|i| i.code == 6).map(|i| i.k).collect();
        assert!(returns.contains(&0x7fff_0000) && returns.contains(&(0x0005_0000 | 13)), "{returns:x?}");
    }

    /// What a program answers to call `number` of `arch`.
    fn answer(filter: &Filter, arch: u32, number: u32) -> u32 {
        let program = filter.program();
        let (mut at, mut a) = (0usize, 0u32);
        loop {
            let i = program[at];
            at += 1;
            let jump = |taken: bool| usize::from(if taken { i.jt } else { i.jf });
            match i.code {
                LOAD if i.k == 4 => a = arch,
                LOAD if i.k == 0 => a = number,
                JUMP => at += i.k as usize,
                JUMP_EQUAL => at += jump(a == i.k),
                JUMP_GREATER => at += jump(a > i.k),
                0x35 => at += jump(a >= i.k),
                JUMP_SET => at += jump(a & i.k != 0),
                RETURN => return i.k,
                code => panic!("operation {code:#x}"),
            }
        }
    }

    #[test]
    #[cfg(target_arch = "x86_64")]
    fn calls_younger_than_the_profile_do_not_exist() {
        const X86_64: u32 = 0xc000_003e;
        let filter = compiled(
            r#"{"defaultAction":"SCMP_ACT_ERRNO","architectures":["SCMP_ARCH_X86_64","SCMP_ARCH_X86"],
                "syscalls":[{"names":["read","statx"],"action":"SCMP_ACT_ALLOW"}]}"#,
        )
        .unwrap();
        assert_eq!(answer(&filter, X86_64, 0), 0x7fff_0000);
        assert_eq!(answer(&filter, X86_64, 1), 0x0005_0001, "write is older and not allowed");
        assert_eq!(answer(&filter, X86_64, 332), 0x7fff_0000);
        assert_eq!(answer(&filter, X86_64, 435), RETURN_ENOSYS);
        assert_eq!(answer(&filter, 0x4000_0003, 383), 0x7fff_0000, "statx of i386");
        assert_eq!(answer(&filter, 0x4000_0003, 435), RETURN_ENOSYS);
        assert_ne!(answer(&filter, X86_64, X32_BIT | 435), RETURN_ENOSYS);
        let open = compiled(r#"{"defaultAction":"SCMP_ACT_ALLOW"}"#).unwrap();
        assert_eq!(answer(&open, X86_64, 435), 0x7fff_0000);
    }

    #[test]
    fn several_conditions_on_one_argument_become_several_rules() {
        compiled(
            r#"{"defaultAction":"SCMP_ACT_ERRNO","architectures":["SCMP_ARCH_X86_64","SCMP_ARCH_X86"],"syscalls":[
                {"names":["personality"],"action":"SCMP_ACT_ALLOW","args":[
                    {"index":0,"value":0,"op":"SCMP_CMP_EQ"},{"index":0,"value":8,"op":"SCMP_CMP_EQ"}]}]}"#,
        )
        .unwrap();
    }
}
