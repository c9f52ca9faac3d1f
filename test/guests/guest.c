#include "guest.h"

/* struct hvm_start_info and its memory map (Xen public header arch-x86/hvm/start_info.h). */
struct start_info {
    uint32_t magic, version, flags, module_count;
    uint64_t modules, command_line, rsdp, memory_map;
    uint32_t memory_map_entries, reserved;
};
struct map_entry { uint64_t address, size; uint32_t type, reserved; };
struct __attribute__((packed)) e820_entry { uint64_t address, size; uint32_t type; };

extern uint64_t page_directory[2048];
static const uint8_t *info;
static int is_boot_params;

void put(char c)
{
    while (!(inb(COM1 + 5) & 0x20))
        relax();
    outb(COM1, (uint8_t)c);
}

void print(const char *text)
{
    for (; *text; text++)
        put(*text);
}

void print_decimal(uint64_t value)
{
    char digits[20];
    unsigned count = 0;
    do
        digits[count++] = (char)('0' + value % 10);
    while (value /= 10);
    while (count)
        put(digits[--count]);
}

void print_hex(uint64_t value)
{
    print("0x");
    int shift = 60;
    while (shift && !(value >> shift))
        shift -= 4;
    for (; shift >= 0; shift -= 4)
        put("0123456789abcdef"[(value >> shift) & 15]);
}

void power_off(void)
{
    outw(PM1_CONTROL, (5 << 10) | (1 << 13)); /* ovms: S5 has sleep type 5 */
    outb(0x600, (5 << 2) | (1 << 5));         /* Cloud Hypervisor */
    outb(0x64, 0xfe);                         /* Firecracker: keyboard controller's reset */
    halt();
}

const char *command_line(void)
{
    uint64_t address = is_boot_params ? *(const uint32_t *)(info + 0x228)
                                      : ((const struct start_info *)info)->command_line;
    return address ? (const char *)address : "";
}

uint64_t argument(const char *name, uint64_t otherwise)
{
    for (const char *word = command_line(); *word; word++) {
        unsigned length = 0;
        while (name[length] && word[length] == name[length])
            length++;
        if (name[length] || word[length] != '=')
            continue;
        uint64_t value = 0;
        for (const char *digit = word + length + 1; *digit >= '0' && *digit <= '9'; digit++)
            value = value * 10 + (uint64_t)(*digit - '0');
        return value;
    }
    return otherwise;
}

int memory_range(unsigned index, struct range *range)
{
    if (is_boot_params) {
        const struct e820_entry *entry = (const struct e820_entry *)(info + 0x2d0) + index;
        if (index >= info[0x1e8])
            return 0;
        *range = (struct range){entry->address, entry->size, entry->type};
        return 1;
    }
    const struct start_info *start = (const struct start_info *)info;
    const struct map_entry *entry = (const struct map_entry *)start->memory_map + index;
    if (index >= start->memory_map_entries)
        return 0;
    *range = (struct range){entry->address, entry->size, entry->type};
    return 1;
}

volatile void *map(unsigned window, uint64_t physical)
{
    unsigned page = 0xd0000000u / 0x200000 + window; /* nothing else needs these addresses */
    uint64_t virtual = (uint64_t)page * 0x200000;
    page_directory[page] = (physical & ~0x1fffffULL) | 0x83;
    __asm__ volatile("invlpg (%0)" ::"r"(virtual) : "memory");
    return (volatile void *)(virtual + (physical & 0x1fffff));
}

void guest_main(const void *pointer, int boot_params)
{
    info = pointer;
    is_boot_params = boot_params;
    run();
    power_off();
}
