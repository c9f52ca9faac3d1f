/* Counts for ever, in memory and on disk, and says so: a machine that goes on from a snapshot goes on counting, and one
 * whose memory and disk are not of one instant is found out.
 *
 *   fill=MIB    writes that much memory before it counts (default 1)
 *   at=MIB      from there up, counted without the hole below 4 GiB, of which it must lie below (default 16)
 *   dirty=N     rewrites so many of these pages at every tick (default 16)
 *   disk=0      leaves the disk alone; otherwise every tick writes the count to sector 8
 *   period=N    turns of a loop between ticks (default 20000)
 *   rate=N      waits besides so that it dirties no more than N MB/s (default: no bound)
 *   count=N     powers off when it has come so far (default: never)
 *
 * The ACPI power button makes it look through all of it and power off. */
#include "blk.h"

#define PAGE 4096
#define LARGE 0x200000
#define SALT 0x9e3779b97f4a7c15ull

static uint64_t first, pages, next, ticks;
/* Pages below the hole for devices, and where memory goes on above it. */
static uint64_t low_pages, high;

static void find_memory(void)
{
    struct range range;
    for (unsigned i = 0; memory_range(i, &range); i++) {
        uint64_t end = range.address + range.size;
        if (range.type != 1 || end <= first)
            continue;
        if (range.address <= first)
            low_pages = (end - first) / PAGE;
        else
            high = range.address;
    }
}

/* The page with number `index` of the memory that is filled. */
static volatile uint64_t *page(uint64_t index)
{
    static volatile uint8_t *window;
    static uint64_t mapped = 1;
    uint64_t address = index < low_pages ? first + index * PAGE : high + (index - low_pages) * PAGE;
    if ((address & ~(LARGE - 1ull)) != mapped) {
        mapped = address & ~(LARGE - 1ull);
        window = map(2, mapped);
    }
    return (volatile uint64_t *)(window + (address & (LARGE - 1)));
}

static void write_page(uint64_t index)
{
    volatile uint64_t *words = page(index);
    words[0] = (index + 1) * SALT;
    words[511] = ticks;
}

static int memory_good(void)
{
    for (uint64_t i = 0; i < pages; i++) {
        volatile uint64_t *words = page(i);
        if (words[0] != (i + 1) * SALT || words[511] > ticks) {
            print("memory bad at page ");
            print_decimal(i);
            print("\n");
            return 0;
        }
    }
    return 1;
}

static void write_count(void)
{
    for (unsigned i = 0; i < 512; i++)
        data[i] = (uint8_t)(ticks >> i % 8 * 8);
    blk_request(1, 8);
    blk_request(4, 0);
}

/* The disk is at most one tick behind: the last write may not have been made yet. */
static int disk_good(void)
{
    blk_request(0, 8);
    uint64_t found = 0;
    for (unsigned i = 0; i < 8; i++)
        found |= (uint64_t)data[i] << i * 8;
    if (found == ticks || found + 1 == ticks)
        return 1;
    print("disk bad: it holds ");
    print_decimal(found);
    print("\n");
    return 0;
}

/* Turns of the timer since `from`; it has 24 bits. */
static uint32_t since(uint32_t from)
{
    return (inl(PM_TIMER) - from) & 0xffffff;
}

static void end(int disk)
{
    int good = memory_good();
    if (disk && !disk_good())
        good = 0;
    print(good ? "all good at " : "not good at ");
    print_decimal(ticks);
    print("\n");
}

void run(void)
{
    int disk = argument("disk", 1) != 0;
    uint64_t period = argument("period", 20000), dirty = argument("dirty", 16), last = argument("count", 0);
    uint64_t rate = argument("rate", 0), turns = rate ? dirty * PAGE * TIMER_HZ / (rate * 1000000) : 0;
    pages = argument("fill", 1) << 8;
    first = argument("at", 16) << 20;
    find_memory();
    if (disk)
        blk_start();
    for (uint64_t i = 0; i < pages; i++)
        write_page(i);
    print("tally\n");
    for (;; ticks++) {
        uint32_t began = inl(PM_TIMER);
        if (disk)
            write_count();
        for (uint64_t i = 0; i < dirty; i++, next = (next + 1) % pages)
            write_page(next);
        print("count ");
        print_decimal(ticks);
        print("\n");
        if (last && ticks == last)
            return;
        for (uint64_t i = 0; i < period; i++) {
            if ((i & 0xfff) == 0 && (inw(PM1_STATUS) & (1 << 8))) {
                outw(PM1_STATUS, 1 << 8);
                print("power button\n");
                end(disk);
                return;
            }
            relax();
        }
        while (since(began) < turns)
            relax();
    }
}
