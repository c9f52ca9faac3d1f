/* Gives back every byte that comes in on COM1; `q` powers off. */
#include "guest.h"

void run(void)
{
    print("echo ready\n");
    for (;;) {
        if (!(inb(COM1 + 5) & 1)) {
            relax();
            continue;
        }
        char c = (char)inb(COM1);
        if (c == 'q') {
            print("bye\n");
            return;
        }
        put(c);
    }
}
