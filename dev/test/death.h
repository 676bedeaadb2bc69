// How the tests look at an error: the program says exactly one line on standard error and exits with
// status 1.
#pragma once

#include <gtest/gtest.h>

#include <string>

// A POSIX regular expression that matches "rank 0: " + message + newline, and nothing before or after it.
inline std::string one_line(const std::string& message) {
    std::string pattern = "^rank 0: ";
    for (char c : message) {
        if (std::string("\\^$.|?*+()[]{}").find(c) != std::string::npos) pattern += '\\';
        pattern += c;
    }
    return pattern + "\n$";
}

// The statement ends the process with status 1 after that one line.
#define EXPECT_FATAL(statement, message) \
    EXPECT_EXIT(statement, ::testing::ExitedWithCode(1), one_line(message))
