/* What every bare-metal test guest may use: ports, COM1, power, the command line. No library, no interrupts. */
#ifndef GUEST_H
#define GUEST_H

#include <stdint.h>

#define COM1 0x3f8
#define PM1_STATUS 0x600  /* bit 8: power button was pressed */
#define PM1_CONTROL 0x604 /* bits 10-12: sleep type, bit 13: sleep enable */
#define PM_TIMER 0x608    /* counts up with 24 bits */
#define TIMER_HZ 3579545ull
#define DEBUG_PORT 0x80

static inline void outb(uint16_t port, uint8_t value) { __asm__ volatile("outb %0, %1" ::"a"(value), "Nd"(port)); }
static inline void outw(uint16_t port, uint16_t value) { __asm__ volatile("outw %0, %1" ::"a"(value), "Nd"(port)); }
static inline void outl(uint16_t port, uint32_t value) { __asm__ volatile("outl %0, %1" ::"a"(value), "Nd"(port)); }
static inline uint8_t inb(uint16_t port) { uint8_t v; __asm__ volatile("inb %1, %0" : "=a"(v) : "Nd"(port)); return v; }
static inline uint16_t inw(uint16_t port) { uint16_t v; __asm__ volatile("inw %1, %0" : "=a"(v) : "Nd"(port)); return v; }
static inline uint32_t inl(uint16_t port) { uint32_t v; __asm__ volatile("inl %1, %0" : "=a"(v) : "Nd"(port)); return v; }
static inline void relax(void) { __asm__ volatile("pause" ::: "memory"); }

/* One range of the machine's memory map; type 1 is RAM. */
struct range { uint64_t address, size; uint32_t type; };

void put(char c);
void print(const char *text);
void print_decimal(uint64_t value);
void print_hex(uint64_t value);
/* ACPI S5; does not return. Tries the ports of other machine monitors behind ours. */
void power_off(void) __attribute__((noreturn));
/* The kernel command line, never null. */
const char *command_line(void);
/* The number behind `name=` on the command line, or `otherwise`. */
uint64_t argument(const char *name, uint64_t otherwise);
/* Number `index` of the memory map; 0 behind the last one. */
int memory_range(unsigned index, struct range *range);
/* Maps the 2 MiB page around `physical` into window 0..15 and gives its virtual address. */
volatile void *map(unsigned window, uint64_t physical);

void halt(void) __attribute__((noreturn));
/* The guest's own part. */
void run(void);

#endif
