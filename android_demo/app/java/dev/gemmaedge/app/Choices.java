package dev.gemmaedge.app;

import android.app.Activity;
import android.app.AlertDialog;
import android.content.DialogInterface;

import java.util.ArrayList;
import java.util.List;

/** A short menu. */
final class Choices {
    private final Activity screen;
    private final List<String> names = new ArrayList<String>();
    private final List<Runnable> tasks = new ArrayList<Runnable>();

    Choices(Activity screen) {
        this.screen = screen;
    }

    void add(int name, Runnable task) {
        add(screen.getString(name), task);
    }

    void add(String name, Runnable task) {
        names.add(name);
        tasks.add(task);
    }

    void show() {
        new AlertDialog.Builder(screen).setItems(names.toArray(new String[0]), new DialogInterface.OnClickListener() {
            @Override
            public void onClick(DialogInterface dialog, int which) {
                tasks.get(which).run();
            }
        }).show();
    }
}
