/* Prints one line and powers off. */
#include "guest.h"

void run(void)
{
    print("hello from the guest\n");
    if (*command_line()) {
        print("args: ");
        print(command_line());
        print("\n");
    }
}
