/* Entry of the bare-metal test guests: PVH (32-bit, no paging) or the 64-bit Linux boot protocol, whichever the
 * machine monitor picks; both end in `guest_main(void *info)` in long mode with the low 4 GiB mapped one to one.
 *
 * The page tables are data, not code: on a software KVM every instruction of a loop that fills them would cost a
 * microsecond. -DNO_PVH leaves the note out, so that a monitor has only the 64-bit entry. */

#ifndef NO_PVH
    .section .note.pvh, "a", @note
    .align 4
    .long 4, 4, 18              /* name size, descriptor size, XEN_ELFNOTE_PHYS32_ENTRY */
    .asciz "Xen"
    .long start32
#endif

    .section .head, "ax"
    .code32
    .globl start32
start32:                        /* EBX = struct hvm_start_info */
    movl $stack_top, %esp
    movl $pml4, %eax
    movl %eax, %cr3
    movl %cr4, %eax
    orl $(1 << 5), %eax         /* PAE */
    movl %eax, %cr4
    movl $0xc0000080, %ecx      /* EFER */
    rdmsr
    orl $(1 << 8), %eax         /* LME */
    wrmsr
    movl %cr0, %eax
    orl $0x80000001, %eax       /* PG, PE */
    movl %eax, %cr0
    lgdtl gdt_pointer
    ljmpl $8, $long_mode

    .code64
long_mode:
    movw $16, %ax
    movw %ax, %ds
    movw %ax, %es
    movw %ax, %ss
    movl %ebx, %edi
    xorl %esi, %esi
    jmp enter

    .globl start64
start64:                        /* RSI = struct boot_params; paging is on */
    movq $stack_top, %rsp
    movl $pml4, %eax
    movq %rax, %cr3
    movq %rsi, %rdi
    movl $1, %esi
enter:
    call guest_main
    .globl halt
halt:
    cli
    hlt
    jmp halt

    .section .data
    .align 8
gdt:
    .quad 0
    .quad 0x00af9b000000ffff    /* 64-bit code */
    .quad 0x00cf93000000ffff    /* data */
gdt_pointer:
    .word . - gdt - 1
    .long gdt

    .align 4096
pml4:
    .quad pdpt + 3
    .fill 511, 8, 0
pdpt:
    .quad page_directory + 0x0003
    .quad page_directory + 0x1003
    .quad page_directory + 0x2003
    .quad page_directory + 0x3003
    .fill 508, 8, 0
    .globl page_directory
page_directory:                 /* 2 MiB pages: present, writable, large */
    .set page, 0
    .rept 2048
    .quad page * 0x200000 + 0x83
    .set page, page + 1
    .endr

    .section .bss
    .align 16
    .skip 16384
stack_top:
