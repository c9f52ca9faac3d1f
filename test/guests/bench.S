/* The shortest guest there is: one byte to COM1, one to port 0x80, then ACPI power-off. 32-bit, no paging, no stack. */
    .section .note.pvh, "a", @note
    .align 4
    .long 4, 4, 18
    .asciz "Xen"
    .long start32

    .section .head, "ax"
    .globl start64, start32
    .code32
start32:
start64:                        /* the bytes mean the same in 64-bit mode */
    movw $0x3f8, %dx
    movb $'x', %al
    outb %al, %dx
    outb %al, $0x80
    movw $0x604, %dx
    movw $0x3400, %ax
    outw %ax, %dx
    movw $0x600, %dx
    movb $0x34, %al
    outb %al, %dx
    movb $0xfe, %al
    outb %al, $0x64
1:  hlt
    jmp 1b
