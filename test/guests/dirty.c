/* Writes its memory over and over, so that a torn copy of it shows: pass N puts N into the first word of every page from
 * 16 MiB up, in order, so at any instant some pages hold N and all behind them N-1.
 *   mib=N   that many MiB (default 16)
 *   hot=N   only the first N MiB after the first pass
 *   rate=N  MiB a second (default: as fast as it can)
 *   fill=1  the first pass fills the pages with what compresses to about half
 *   cpus=N  the other processors do the same below 1 MiB, 32 pages each from 128 KiB up, with 16-bit words
 * Says "dirty" after the first pass; the power button ends it. */
#include "guest.h"

#define START 0x1000000ull
#define LARGE 0x200000ull
#define PAGE 4096
#define COUNTER 0x7000
#define TRAMPOLINE 0x8000

extern const uint8_t writer[], writer_end[];

__asm__(".pushsection .rodata\n"
        ".code16\n"
        "writer:\n"
        "xorw %ax, %ax\n"
        "movw %ax, %ds\n"
        "movw $1, %bx\n"
        "lock xaddw %bx, 0x7000\n" /* which one am I? */
        "shlw $13, %bx\n"
        "addw $0x2000, %bx\n"
        "xorw %cx, %cx\n"
        "1: incw %cx\n"
        "movw %bx, %dx\n"
        "movw $32, %si\n"
        "2: movw %dx, %es\n"
        "movw %cx, %es:0\n"
        "addw $0x100, %dx\n"
        "decw %si\n"
        "jnz 2b\n"
        "jmp 1b\n"
        "writer_end:\n"
        ".code64\n"
        ".popsection\n");

static volatile uint32_t *const apic = (volatile uint32_t *)0xfee00000;

static void send(uint32_t command)
{
    apic[0x300 / 4] = command;
    while (apic[0x300 / 4] & (1 << 12))
        relax();
}

static void wake(uint64_t others)
{
    volatile uint16_t *counter = (volatile uint16_t *)COUNTER;
    for (unsigned i = 0; writer + i < writer_end; i++)
        ((volatile uint8_t *)TRAMPOLINE)[i] = writer[i];
    *counter = 0;
    apic[0xf0 / 4] |= 0x100;
    send(0x000c4500);
    for (unsigned i = 0; i < 1000; i++)
        relax();
    send(0x000c4600 | TRAMPOLINE >> 12);
    send(0x000c4600 | TRAMPOLINE >> 12);
    for (uint64_t i = 0; i < 20000000 && *counter < others; i++)
        relax();
}

/* Sixteen pages that compress to about half, and have nothing in common. */
static uint64_t patterns[16][PAGE / 8] __attribute__((aligned(4096)));

static void make_patterns(void)
{
    uint64_t seed = 0x9e3779b97f4a7c15ull;
    for (unsigned i = 0; i < sizeof patterns / 8; i++) {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        (&patterns[0][0])[i] = i & 1 ? seed : seed & 7;
    }
}

/* One instruction: where the processor is emulated, each takes about a microsecond. */
static void fill(volatile void *page, unsigned number)
{
    const uint64_t *from = patterns[number % 16];
    uint64_t count = PAGE / 8;
    __asm__ volatile("rep movsq" : "+D"(page), "+S"(from), "+c"(count)::"memory");
}

/* Waits until `pages` pages may have been written since `began`. */
static void pace(uint32_t began, uint64_t pages, uint64_t rate)
{
    if (rate)
        while ((uint32_t)(inl(PM_TIMER) - began) * rate * 256 < pages * TIMER_HZ)
            relax();
}

static int power_button(void)
{
    if (!(inw(PM1_STATUS) & (1 << 8)))
        return 0;
    outw(PM1_STATUS, 1 << 8);
    return 1;
}

/* The physical address of byte `offset` of RAM without its hole. */
static uint64_t place(uint64_t offset)
{
    return offset < 0xc0000000ull ? offset : offset + 0x40000000ull;
}

void run(void)
{
    uint64_t mib = argument("mib", 16), hot = argument("hot", mib), rate = argument("rate", 0);
    uint64_t filling = argument("fill", 0), cpus = argument("cpus", 1);
    if (cpus > 1)
        wake(cpus - 1);
    if (filling)
        make_patterns();
    for (uint64_t pass = 1;; pass++) {
        uint32_t began = inl(PM_TIMER);
        uint64_t length = (pass == 1 ? mib : hot) << 20;
        for (uint64_t large = 0; large < length; large += LARGE) {
            volatile uint8_t *window = map(0, place(START + large));
            for (unsigned offset = 0; offset < LARGE; offset += PAGE) {
                volatile uint64_t *page = (volatile uint64_t *)(window + offset);
                if (filling && pass == 1)
                    fill(page, offset / PAGE);
                *page = pass;
                if (pass > 1 && offset % 0x10000 == 0xf000)
                    pace(began, (large + offset) / PAGE + 1, rate);
            }
            if (power_button())
                return;
        }
        if (pass == 1)
            print("dirty\n");
    }
}
