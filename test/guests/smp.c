/* Wakes every other processor by INIT and SIPI (Intel SDM vol. 3, 9.4.4) and prints how many came; `cpus=N` is how
 * many to wait for. */
#include "guest.h"

#define COUNTER 0x7000
#define TRAMPOLINE 0x8000

static volatile uint32_t *const apic = (volatile uint32_t *)0xfee00000;

static void send(uint32_t command)
{
    apic[0x300 / 4] = command;
    while (apic[0x300 / 4] & (1 << 12))
        relax();
}

void run(void)
{
    /* xor ax,ax; mov ds,ax; lock inc word [COUNTER]; 1: hlt; jmp 1b */
    static const uint8_t code[] = {0x31, 0xc0, 0x8e, 0xd8, 0xf0, 0xff, 0x06, 0x00, 0x70, 0xf4, 0xeb, 0xfd};
    volatile uint16_t *counter = (volatile uint16_t *)COUNTER;
    uint64_t others = argument("cpus", 1) - 1;
    for (unsigned i = 0; i < sizeof code; i++)
        ((volatile uint8_t *)TRAMPOLINE)[i] = code[i];
    *counter = 0;
    apic[0xf0 / 4] |= 0x100;            /* switch the local APIC on */
    send(0x000c4500);                   /* INIT to all but self */
    for (unsigned i = 0; i < 1000; i++)
        relax();
    send(0x000c4600 | TRAMPOLINE >> 12); /* start-up at TRAMPOLINE, twice */
    send(0x000c4600 | TRAMPOLINE >> 12);
    for (uint64_t i = 0; i < 20000000 && *counter < others; i++)
        relax();
    print("cpus ");
    print_decimal(1 + *counter);
    print("\n");
}
